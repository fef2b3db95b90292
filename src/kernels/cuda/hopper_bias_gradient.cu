// the gradient of a bias on Hopper: how it is shared out, and its launch
//
// Its kernels may spill a few words a tile: what names slots and notes, while both products are issued.
#include "kernels/cuda/hopper_bias_gradient.cuh"

#include "kernels/cuda/attention.cuh"

static const char function[] = "sa_backward";

// In tiles: batches, heads, rows and columns.
static void tiles_of(int64_t tiles[4], int64_t batches, int64_t heads, int64_t rows, int64_t columns) {
  tiles[0] = batches;
  tiles[1] = heads;
  tiles[2] = (rows + SA_TILE - 1) / SA_TILE;
  tiles[3] = (columns + SA_TILE - 1) / SA_TILE;
}

static int64_t bias_tiles(const sa_problem *p, int64_t tiles[4]) {
  const int64_t *shape = p->bias_shape;
  tiles_of(tiles, shape[0], shape[1], shape[2], shape[3]);
  return tiles[0] * tiles[1] * tiles[2] * tiles[3];
}

bool hopper_bias_gradient_covers(const sa_problem *p) {
  int64_t tiles[4];
  return !(p->softcap > 0) && !p->alibi.data && !(p->dropout > 0) && bias_tiles(p, tiles) < INT32_MAX / 2;
}

static bool writes_fours(const sa_operand &x, const int64_t shape[4]) {
  const int64_t *stride = x.stride;
  return stride[3] == 1 && shape[3] % 4 == 0 && (uintptr_t)x.data % (x.dtype == SA_F32 ? 16 : 8) == 0 &&
         stride[0] % 4 == 0 && stride[1] % 4 == 0 && stride[2] % 4 == 0;
}

template <class SHAPE>
static int launch(const hopper_backward_call &c, const hopper_bias_sums &sums, unsigned blocks, cudaStream_t stream) {
  return sa_cuda_launch(function, hopper_bias_gradient<SHAPE>, blocks, HOPPER_BIAS_THREADS, SHAPE::bytes, stream, c,
                        sums);
}

int hopper_bias_gradient_launch(const sa_problem *p, const hopper_backward_call &c, cudaStream_t stream) {
  hopper_bias_sums sums = {};
  int64_t all[4], own[4], turns = 1;
  tiles_of(all, p->batch, p->heads, p->queries, p->keys);
  const int64_t tiles = bias_tiles(p, own);
  sums.to = p->dbias;
  sums.count = 1;
  for (int d = 0; d < 4; d++) {
    sums.shape[d] = (int32_t)p->bias_shape[d];
    sums.tiles[d] = (int32_t)own[d];
    sums.turns[d] = (int32_t)(all[d] / own[d]);
    sums.count *= p->bias_shape[d];
    turns *= sums.turns[d];
  }
  // Parts keep all multiprocessors busy when the bias has few tiles; what they find takes at most 64 MiB.
  const int64_t processors = sa_cuda_properties_of(p->device)->processors, room_for = (64 << 20) / (sums.count * 4);
  int64_t parts = 4 * processors / tiles;
  if (parts > turns) parts = turns;
  if (parts > room_for) parts = room_for;
  sums.parts = (int32_t)(parts < 1 ? 1 : parts);
  sums.fours = sums.parts == 1 && writes_fours(p->dbias, p->bias_shape);
  if (sums.parts > 1) {
    sums.part = (float *)sa_cuda_scratch(function, p->device, sums.parts * sums.count * 4);
    if (!sums.part) return SA_NO_MEMORY;
  }
  sums.jobs = (int32_t)(tiles * sums.parts);
  const unsigned blocks = (unsigned)(sums.jobs < processors ? sums.jobs : processors);
  const bool wide = p->bias.dtype == SA_F32;
  int status = p->dtype == SA_BF16 ? wide ? launch<hopper_bias_shape<__nv_bfloat16, true>>(c, sums, blocks, stream)
                                          : launch<hopper_bias_shape<__nv_bfloat16, false>>(c, sums, blocks, stream)
               : wide ? launch<hopper_bias_shape<__half, true>>(c, sums, blocks, stream)
                                   : launch<hopper_bias_shape<__half, false>>(c, sums, blocks, stream);
  if (!status && sums.part) status = sa_cuda_sum_bias_parts(*p, stream, sums.parts, sums.count, sums.part);
  if (sums.part) sa_cuda_scratch_release(p->device, sums.part);
  return status;
}
