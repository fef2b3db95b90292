// the gradient of a bias on Hopper: TMA and wgmma over the visible tiles of the plan
//
// dBias is dS, summed over what the bias is broadcast along. A block per multiprocessor stays for the whole launch and
// takes jobs from one counter: a tile of the bias, 128 x 128 or less where it has one row or column, with all tiles of
// pairs that share it, or a part of them where tiles are few. Their sum stays in registers and is written once, in a
// fixed order, so that it has the same bits every time.
//
//   warpgroup 0     gives its registers away. Warp 0 finds the tiles of pairs and loads Q and K, dO and V of each.
//   warpgroup 1, 2  64 queries each. S = Q K^T and dP = dO V^T of a tile run together; the exponentials of S under dP
//                   and under the products of the other warpgroup.
//
// Shared memory: six slots of 128 rows of Q, K, dO or V, 192 KiB, and the tile of the bias in halves, 32 KiB, each
// thread its own elements; or five slots and the tile in f32, 64 KiB. Registers: sums, S, dP: 64 each. Widths are
// padded to 128 with zeros, which TMA adds and memory does not send: what bounds the kernel is the second-level cache,
// 128 KiB a tile of pairs of width 128.
//
// There is no careful pass: S and dP of a pair are made of its own rows alone, and masked pairs are selected to 0.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CUH
#include "kernels/cuda/hopper_bias_gradient_consumer.cuh"
#include "kernels/cuda/hopper_bias_gradient_producer.cuh"

template <class SHAPE>
__global__ void __launch_bounds__(HOPPER_BIAS_THREADS, 1)
    hopper_bias_gradient(const __grid_constant__ hopper_backward_call c,
                         const __grid_constant__ hopper_bias_sums sums) {
  const uint32_t base = hopper_block_memory();
  const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    hopper_block_slots(base + SHAPE::slot_full, base + SHAPE::slot_free, SHAPE::slots, 8);
    hopper_block_slots(base + SHAPE::note_full, base + SHAPE::note_free, HOPPER_BIAS_NOTES, 8);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    registers_give_back<HOPPER_BIAS_PRODUCER_REGISTERS>();
    if (warp == 0) hopper_bias_producer<SHAPE>(c, sums, base).run();
  } else {
    registers_take<HOPPER_BIAS_CONSUMER_REGISTERS>();
    hopper_bias_consumer<SHAPE>(c, sums, base).run();
  }
}

// Of hopper_bias_gradient.cu: whether it makes the gradient of a problem's bias, and that, after the statistics of the
// rows.
bool hopper_bias_gradient_covers(const sa_problem *p);
int hopper_bias_gradient_launch(const sa_problem *p, const hopper_backward_call &c, cudaStream_t stream);

#endif
