// compiled masks on the device: uploaded once, with the bits in the order of the kernels' registers
#include <string.h>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/plan.cuh"

// What the host keeps with its plan for one device.
typedef struct uploaded_plan {
  sa_device_plan plan;
  int device;
  void *memory;
} uploaded_plan;

static void drop_uploaded(void *copy) {
  uploaded_plan *uploaded = (uploaded_plan *)copy;
  sa_cuda_scratch_release(uploaded->device, uploaded->memory);
  sa_cuda_host->release(uploaded);
}

enum { PATTERN_WORDS = SA_TILE * (SA_TILE / 64), ROW_ENTRIES = 256, COL_ENTRIES = 512 };

// The two lowest bits of a word's bytes, every four bits.
static __device__ __forceinline__ uint32_t lowest_pairs(uint32_t word) {
  word &= 0x03030303;
  word = (word | word >> 4) & 0x00ff00ff;
  return (word | word >> 8) & 0xffff;
}

// Bits 0 and 8 of eight keys' words, each shifted down: the keys' bits in a byte each.
static __device__ __forceinline__ uint32_t bits_of_eight(const uint32_t *words, int first, int key, int shift) {
  uint32_t both = 0;
#pragma unroll
  for (int k = 0; k < 8; k++) both |= (words[4 * (first + k / 2 * 8 + key + k % 2)] >> shift & 0x101) << k;
  return both;
}

// Bits of one pattern a block, from the host's order into those of plan.cuh. By words of 32 bits and several bits at a
// time: bit by bit the 65536 tiles of 32768 x 32768 took an H200 347 us, and now 291.
static __global__ void __launch_bounds__(ROW_ENTRIES)
    order_bits_kernel(const uint64_t *patterns, uint2 *row_bits, uint32_t *col_bits, int64_t count) {
  __shared__ uint64_t word[PATTERN_WORDS];
  for (int64_t pattern = blockIdx.x; pattern < count; pattern += gridDim.x) {
    const int thread = (int)threadIdx.x, lane = thread % 32;
    word[thread] = patterns[pattern * PATTERN_WORDS + thread];
    __syncthreads();
    const uint32_t *words = (const uint32_t *)word;  // four a key
    const int query = thread / 32 * 16 + lane / 4, of_query = query / 32;
    uint2 row = make_uint2(0, 0);
#pragma unroll
    for (int eight = 0; eight < 4; eight++) {
      const uint32_t both = bits_of_eight(words + of_query, 32 * eight, 2 * (lane % 4), query % 32);
      row.x |= (both & 0xff) << 8 * eight;
      row.y |= both >> 8 << 8 * eight;
    }
    row_bits[pattern * ROW_ENTRIES + thread] = row;
#pragma unroll
    for (int entry = thread; entry < COL_ENTRIES; entry += ROW_ENTRIES) {
      const int key = entry / 128 % 2 * 64 + entry % 128 / 32 * 16 + lane / 4;
      uint32_t column = 0;
#pragma unroll
      for (int part = 0; part < 4; part++) {
        const int down = part % 2, upper = part / 2;
        const uint32_t queries = words[4 * (key + 8 * down) + entry / 256 * 2 + upper] >> 2 * (lane % 4);
        column |= lowest_pairs(queries) << (16 * upper + 2 * down);
      }
      col_bits[pattern * COL_ENTRIES + entry] = column;
    }
    __syncthreads();
  }
}

static int64_t tiles_of(const sa_run *runs, const int64_t *start) {
  int64_t tiles = 0;
  for (int64_t k = start[0]; k < start[1]; k++) tiles += runs[k].count;
  return tiles;
}

// The lists of every plane by their number of tiles, most first, equal ones in their order: counted, then placed.
static void order_lists(int32_t *order, int64_t *place, const sa_run *runs, const int64_t *start, int64_t planes,
                        int64_t lists, int64_t most) {
  for (int64_t plane = 0; plane < planes; plane++, start += lists, order += lists) {
    memset(place, 0, (size_t)(most + 2) * sizeof *place);
    for (int64_t k = 0; k < lists; k++) place[most - tiles_of(runs, start + k) + 1]++;
    for (int64_t n = 1; n <= most; n++) place[n] += place[n - 1];
    for (int64_t k = 0; k < lists; k++) order[place[most - tiles_of(runs, start + k)]++] = (int32_t)k;
  }
}

// How many tiles lie before each row, one for a row of none, and before each run of a row.
static void count_before(int64_t *row_before, int64_t *run_before, const sa_run *runs, const int64_t *start,
                         int64_t rows) {
  row_before[0] = 0;
  for (int64_t row = 0; row < rows; row++) {
    int64_t tiles = 0;
    for (int64_t run = start[row]; run < start[row + 1]; tiles += runs[run++].count) run_before[run] = tiles;
    row_before[row + 1] = row_before[row] + (tiles ? tiles : 1);
  }
}

// What the forward on Hopper asks of a row of tiles.
static sa_device_row record_of(const sa_plan *plan, int64_t plane, int32_t tile) {
  const int64_t *start = plan->row_start + plane * plan->row_tiles + tile;
  const sa_run *runs = plan->row_runs + start[0];
  sa_device_row row = {};
  row.tile = tile;
  row.runs = (int32_t)(start[1] - start[0]);
  row.tiles = (int32_t)tiles_of(plan->row_runs, start);
  row.first = start[0];
  int partial = 0;
  while (partial < row.runs && runs[partial].pattern != SA_FULL) partial++;
  if (partial > 1 && partial < row.runs) row.first_run = partial;
  for (int k = 0; k < SA_RECORDED_RUNS && k < row.runs; k++) row.run[k] = runs[k];
  for (int k = 0; k < SA_TILE / 64; k++) {
    const int64_t query = (int64_t)tile * SA_TILE + k * 64, left = plan->queries - query;
    row.dead[k] = left <= 0 ? ~0ull : sa_plan_dead_rows_at(plan, plane, query) | (left < 64 ? ~0ull << left : 0);
  }
  return row;
}

// The arrays of an uploaded plan.
typedef struct arrays {
  int64_t *row_start, *col_start, *row_before, *run_before;
  sa_run *row_runs, *col_runs;
  uint64_t *dead_rows, *dead_keys;
  int32_t *row_order, *col_order;
  sa_device_row *row_records;
  sa_pattern *patterns;
  uint2 *row_bits;
  uint32_t *col_bits;
} arrays;

// How long they are.
typedef struct lengths {
  int64_t rows, cols, row_runs, col_runs, row_words, col_words;
} lengths;

static lengths lengths_of(const sa_plan *plan) {
  const int64_t planes = plan->batch * plan->heads;
  lengths n;
  n.rows = planes * plan->row_tiles;
  n.cols = planes * plan->col_tiles;
  n.row_runs = plan->row_start[n.rows];
  n.col_runs = plan->col_start[n.cols];
  n.row_words = planes * ((plan->queries + 63) / 64);
  n.col_words = planes * ((plan->keys + 63) / 64);
  return n;
}

// An array's place, with room for the device to align the next to.
template <class T>
static void place_array(T **array, char *base, int64_t *end, int64_t count) {
  *array = (T *)((uintptr_t)base + (uintptr_t)*end);
  *end += (count * (int64_t)sizeof(T) + 255) / 256 * 256;
}

// All of them in memory that begins at `base`, behind one another: first those that the host fills. Returns the bytes
// of these; *bytes: of all.
static int64_t lay_out(const sa_plan *plan, char *base, arrays *a, int64_t *bytes) {
  const lengths n = lengths_of(plan);
  int64_t end = 0;
  place_array(&a->row_start, base, &end, n.rows + 1);
  place_array(&a->col_start, base, &end, n.cols + 1);
  place_array(&a->row_runs, base, &end, n.row_runs);
  place_array(&a->col_runs, base, &end, n.col_runs);
  place_array(&a->dead_rows, base, &end, n.row_words);
  place_array(&a->dead_keys, base, &end, n.col_words);
  place_array(&a->row_before, base, &end, n.rows + 1);
  place_array(&a->run_before, base, &end, n.row_runs);
  place_array(&a->row_order, base, &end, n.rows);
  place_array(&a->row_records, base, &end, n.rows);
  place_array(&a->col_order, base, &end, n.cols);
  const int64_t filled = end;
  place_array(&a->patterns, base, &end, plan->pattern_count);
  place_array(&a->row_bits, base, &end, plan->pattern_count * ROW_ENTRIES);
  place_array(&a->col_bits, base, &end, plan->pattern_count * COL_ENTRIES);
  *bytes = end;
  return filled;
}

template <class T>
static void copy_array(T *to, const T *from, int64_t count) {
  if (count) memcpy(to, from, (size_t)count * sizeof *to);
}

// What the host fills. `place` has room for two numbers more than a list has tiles.
static void fill(const sa_plan *plan, const arrays *a, int64_t *place) {
  const lengths n = lengths_of(plan);
  const int64_t planes = plan->batch * plan->heads;
  copy_array(a->row_start, plan->row_start, n.rows + 1);
  copy_array(a->col_start, plan->col_start, n.cols + 1);
  copy_array(a->row_runs, plan->row_runs, n.row_runs);
  copy_array(a->col_runs, plan->col_runs, n.col_runs);
  copy_array(a->dead_rows, plan->dead_rows, n.row_words);
  copy_array(a->dead_keys, plan->dead_keys, n.col_words);
  count_before(a->row_before, a->run_before, plan->row_runs, plan->row_start, n.rows);
  order_lists(a->row_order, place, plan->row_runs, plan->row_start, planes, plan->row_tiles, plan->col_tiles);
  for (int64_t row = 0; row < n.rows; row++)
    a->row_records[row] = record_of(plan, row / plan->row_tiles, a->row_order[row]);
  order_lists(a->col_order, place, plan->col_runs, plan->col_start, planes, plan->col_tiles, plan->row_tiles);
}

// The filled arrays and the patterns to the device, where the patterns' bits are ordered.
static int send(const char *function, const sa_plan *plan, const char *staged, int64_t filled, const arrays *there,
                cudaStream_t stream) {
  int status = sa_cuda_check(function,
                             cudaMemcpyAsync(there->row_start, staged, (size_t)filled, cudaMemcpyHostToDevice, stream));
  if (!status && plan->pattern_count) {
    const size_t bytes = (size_t)plan->pattern_count * sizeof(sa_pattern);
    const int64_t blocks = plan->pattern_count < 65536 ? plan->pattern_count : 65536;
    status = sa_cuda_check(function,
                           cudaMemcpyAsync(there->patterns, plan->patterns, bytes, cudaMemcpyHostToDevice, stream));
    if (!status)
      status = sa_cuda_launch(function, order_bits_kernel, dim3((unsigned)blocks), dim3(ROW_ENTRIES), 0, stream,
                              (const uint64_t *)there->patterns, there->row_bits, there->col_bits, plan->pattern_count);
  }
  // Other streams may use the plan as soon as they find it.
  return status ? status : sa_cuda_check(function, cudaStreamSynchronize(stream));
}

static void describe(sa_device_plan *to, const sa_plan *plan, const arrays *there, int64_t listed) {
  to->batch = plan->batch;
  to->heads = plan->heads;
  to->queries = plan->queries;
  to->keys = plan->keys;
  to->row_tiles = (int32_t)plan->row_tiles;
  to->col_tiles = (int32_t)plan->col_tiles;
  to->row_start = there->row_start;
  to->row_runs = there->row_runs;
  to->row_before = there->row_before;
  to->run_before = there->run_before;
  to->col_start = there->col_start;
  to->col_runs = there->col_runs;
  to->row_bits = there->row_bits;
  to->col_bits = there->col_bits;
  to->dead_rows = there->dead_rows;
  to->dead_keys = there->dead_keys;
  to->row_order = there->row_order;
  to->row_records = there->row_records;
  to->col_order = there->col_order;
  to->listed = listed;
  to->visible = plan->visible;
  to->partial = plan->partial;
  to->full = plan->full;
}

static int upload(const char *function, const sa_plan *plan, int device, uploaded_plan *uploaded) {
  const int64_t most = plan->row_tiles > plan->col_tiles ? plan->row_tiles : plan->col_tiles;
  arrays here, there;
  int64_t bytes;
  const int64_t filled = lay_out(plan, NULL, &here, &bytes);
  char *staged = (char *)sa_cuda_host->allocate(function, filled + (most + 2) * 8);
  if (!staged) return SA_NO_MEMORY;
  lay_out(plan, staged, &here, &bytes);
  fill(plan, &here, (int64_t *)(staged + filled));
  const int64_t listed = here.row_before[lengths_of(plan).rows];

  cudaStream_t stream;
  int status = sa_cuda_use(function, device, &stream);
  char *memory = status ? NULL : (char *)sa_cuda_scratch(function, device, bytes);
  if (memory) {
    lay_out(plan, memory, &there, &bytes);
    status = send(function, plan, staged, filled, &there, stream);
  } else if (!status) {
    status = SA_NO_MEMORY;
  }
  sa_cuda_host->release(staged);
  if (status) {
    if (memory) sa_cuda_scratch_release(device, memory);
    return status;
  }
  uploaded->device = device;
  uploaded->memory = memory;
  describe(&uploaded->plan, plan, &there, listed);
  return SA_OK;
}

const sa_device_plan *sa_cuda_plan(const char *function, const sa_plan *plan, int device) {
  uploaded_plan *uploaded = (uploaded_plan *)sa_cuda_host->plan_copy(plan, device);
  if (uploaded) return &uploaded->plan;
  uploaded = (uploaded_plan *)sa_cuda_host->allocate(function, sizeof *uploaded);
  if (!uploaded) return NULL;
  if (upload(function, plan, device, uploaded)) {
    sa_cuda_host->release(uploaded);
    return NULL;
  }
  uploaded_plan *used = (uploaded_plan *)sa_cuda_host->attach_plan_copy(plan, device, uploaded, drop_uploaded);
  if (!used) {
    drop_uploaded(uploaded);
    return NULL;
  }
  return &used->plan;
}
