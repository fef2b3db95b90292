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

// Bits of one pattern a block, from the host's order into those of plan.cuh.
static __global__ void __launch_bounds__(ROW_ENTRIES)
    order_bits_kernel(const uint64_t *patterns, uint2 *row_bits, uint32_t *col_bits, int64_t count) {
  __shared__ uint64_t word[PATTERN_WORDS];
  for (int64_t pattern = blockIdx.x; pattern < count; pattern += gridDim.x) {
    const int thread = (int)threadIdx.x, lane = thread % 32;
    word[thread] = patterns[pattern * PATTERN_WORDS + thread];
    __syncthreads();
    const int query = thread / 32 * 16 + lane / 4, half = query / 64;
    uint2 row = make_uint2(0, 0);
    for (int bit = 0; bit < 32; bit++) {
      const int key = bit / 2 * 8 + 2 * (lane % 4) + bit % 2;
      const uint64_t queries = word[key * 2 + half] >> query % 64;
      row.x |= (uint32_t)(queries & 1) << bit;
      row.y |= (uint32_t)(queries >> 8 & 1) << bit;
    }
    row_bits[pattern * ROW_ENTRIES + thread] = row;
    for (int entry = thread; entry < COL_ENTRIES; entry += ROW_ENTRIES) {
      const int key = entry / 128 % 2 * 64 + entry % 128 / 32 * 16 + lane / 4;
      uint32_t column = 0;
      for (int down = 0; down < 2; down++) {
        const uint64_t queries = word[(key + 8 * down) * 2 + entry / 256] >> 2 * (lane % 4);
        for (int block = 0; block < 8; block++)
          column |= (uint32_t)(queries >> 8 * block & 3) << (4 * block + 2 * down);
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

// One array of the upload: its place in it, with room for the device to align to.
static int64_t place_array(int64_t *end, int64_t count, int64_t bytes) {
  const int64_t at = *end;
  *end += (count * bytes + 255) / 256 * 256;
  return at;
}

static int upload(const char *function, const sa_plan *plan, int device, uploaded_plan *uploaded) {
  const int64_t planes = plan->batch * plan->heads, rows = planes * plan->row_tiles, cols = planes * plan->col_tiles;
  const int64_t row_runs = plan->row_start[rows], col_runs = plan->col_start[cols];
  const int64_t row_words = planes * ((plan->queries + 63) / 64), col_words = planes * ((plan->keys + 63) / 64);
  const int64_t most = plan->row_tiles > plan->col_tiles ? plan->row_tiles : plan->col_tiles;
  int64_t bytes = 0;
  const int64_t row_start_at = place_array(&bytes, rows + 1, 8), col_start_at = place_array(&bytes, cols + 1, 8);
  const int64_t row_runs_at = place_array(&bytes, row_runs, sizeof(sa_run));
  const int64_t col_runs_at = place_array(&bytes, col_runs, sizeof(sa_run));
  const int64_t dead_rows_at = place_array(&bytes, row_words, 8), dead_keys_at = place_array(&bytes, col_words, 8);
  const int64_t row_before_at = place_array(&bytes, rows + 1, 8), run_before_at = place_array(&bytes, row_runs, 8);
  const int64_t row_order_at = place_array(&bytes, rows, 4), col_order_at = place_array(&bytes, cols, 4);
  const int64_t copied = bytes;
  const int64_t patterns_at = place_array(&bytes, plan->pattern_count, sizeof(sa_pattern));
  const int64_t row_bits_at = place_array(&bytes, plan->pattern_count, ROW_ENTRIES * sizeof(uint2));
  const int64_t col_bits_at = place_array(&bytes, plan->pattern_count, COL_ENTRIES * sizeof(uint32_t));

  char *staged = (char *)sa_cuda_host->allocate(function, copied + (most + 2) * 8);
  if (!staged) return SA_NO_MEMORY;
  memcpy(staged + row_start_at, plan->row_start, (size_t)(rows + 1) * 8);
  memcpy(staged + col_start_at, plan->col_start, (size_t)(cols + 1) * 8);
  if (row_runs) memcpy(staged + row_runs_at, plan->row_runs, (size_t)row_runs * sizeof(sa_run));
  if (col_runs) memcpy(staged + col_runs_at, plan->col_runs, (size_t)col_runs * sizeof(sa_run));
  if (row_words) memcpy(staged + dead_rows_at, plan->dead_rows, (size_t)row_words * 8);
  if (col_words) memcpy(staged + dead_keys_at, plan->dead_keys, (size_t)col_words * 8);
  count_before((int64_t *)(staged + row_before_at), (int64_t *)(staged + run_before_at), plan->row_runs,
               plan->row_start, rows);
  const int64_t listed = ((const int64_t *)(staged + row_before_at))[rows];
  int64_t *place = (int64_t *)(staged + copied);
  order_lists((int32_t *)(staged + row_order_at), place, plan->row_runs, plan->row_start, planes, plan->row_tiles,
              plan->col_tiles);
  order_lists((int32_t *)(staged + col_order_at), place, plan->col_runs, plan->col_start, planes, plan->col_tiles,
              plan->row_tiles);

  cudaStream_t stream;
  int status = sa_cuda_use(function, device, &stream);
  char *memory = status ? NULL : (char *)sa_cuda_scratch(function, device, bytes);
  if (!memory) {
    sa_cuda_host->release(staged);
    return status ? status : SA_NO_MEMORY;
  }
  status = sa_cuda_check(function, cudaMemcpyAsync(memory, staged, (size_t)copied, cudaMemcpyHostToDevice, stream));
  if (!status && plan->pattern_count) {
    status = sa_cuda_check(
        function, cudaMemcpyAsync(memory + patterns_at, plan->patterns,
                                  (size_t)plan->pattern_count * sizeof(sa_pattern), cudaMemcpyHostToDevice, stream));
    const int64_t blocks = plan->pattern_count < 65536 ? plan->pattern_count : 65536;
    if (!status)
      status = sa_cuda_launch(function, order_bits_kernel, dim3((unsigned)blocks), dim3(ROW_ENTRIES), 0, stream,
                              (const uint64_t *)(memory + patterns_at), (uint2 *)(memory + row_bits_at),
                              (uint32_t *)(memory + col_bits_at), plan->pattern_count);
  }
  // Other streams may use the plan as soon as they find it.
  if (!status) status = sa_cuda_check(function, cudaStreamSynchronize(stream));
  sa_cuda_host->release(staged);
  if (status) {
    sa_cuda_scratch_release(device, memory);
    return status;
  }
  uploaded->device = device;
  uploaded->memory = memory;
  sa_device_plan *to = &uploaded->plan;
  to->batch = plan->batch;
  to->heads = plan->heads;
  to->queries = plan->queries;
  to->keys = plan->keys;
  to->row_tiles = (int32_t)plan->row_tiles;
  to->col_tiles = (int32_t)plan->col_tiles;
  to->row_start = (const int64_t *)(memory + row_start_at);
  to->row_runs = (const sa_run *)(memory + row_runs_at);
  to->row_before = (const int64_t *)(memory + row_before_at);
  to->run_before = (const int64_t *)(memory + run_before_at);
  to->col_start = (const int64_t *)(memory + col_start_at);
  to->col_runs = (const sa_run *)(memory + col_runs_at);
  to->row_bits = (const uint2 *)(memory + row_bits_at);
  to->col_bits = (const uint32_t *)(memory + col_bits_at);
  to->dead_rows = (const uint64_t *)(memory + dead_rows_at);
  to->dead_keys = (const uint64_t *)(memory + dead_keys_at);
  to->row_order = (const int32_t *)(memory + row_order_at);
  to->col_order = (const int32_t *)(memory + col_order_at);
  to->listed = listed;
  to->visible = plan->visible;
  to->partial = plan->partial;
  to->full = plan->full;
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
