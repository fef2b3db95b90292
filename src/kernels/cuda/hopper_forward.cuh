// forward attention on Hopper: TMA, wgmma and warp specialisation over the visible tiles of the plan
//
// A block per multiprocessor, two at width 64, stays for the whole launch. Its work items are rows of tiles, 128
// queries of one head, taken from one counter, those with most tiles first among heads whose K and V fit the
// second-level cache together. A step is KEYS keys of an item.
//
//   warpgroup 0     gives its registers away. Warp 0 loads: Q of an item, K, V and bits of its steps, in one stream
//                   across the items. Warp 1 finds the next item and its runs of tiles meanwhile. The other warps write
//                   the rows of tiles that see no key.
//   warpgroup 1, 2  64 queries each. S = Q K^T of a step is issued together with O += P V of the step before, whose P
//                   is in registers; the softmax of S runs under that product. The step that begins an item carries
//                   the last product of the item before, which leaves through shared memory, by TMA if it is of two
//                   panels, under the other warpgroup's products. The two take turns: one issues its products when
//                   the other has its S.
//                   At width 64, where exponentials take as long as products, it is the four warpgroups of two blocks
//                   that overlap, and S, softmax and P V of 64 keys follow one another (hopper_forward_parts.cuh).
//
//   widths      KEYS  Q slots, stages  registers: O, S, P twice  shared memory
//   64, 64      128   1, 2             32, 32 (P in its place)   102 KiB, of each of two blocks
//   the same with extras 2, 2          32, 64, 64                117 KiB
//   96, 96      128   2, 2             48, 64, 64                213 KiB
//   128, 128    128   2, 2             64, 64, 64                213 KiB
//   192, 128    64    2, 2             64, 32, 32                197 KiB
//   192, 192    64    2, 2             96, 32, 32                213 KiB
//   256, 256    64    1, 2             128, 32 (P once: 16)      213 KiB
//
// Bias, softcap, ALiBi and dropout (hopper_scores.cuh) are kernels of their own, for widths of 64 and 128: one for each
// alone and one for all of them, since branches around code that is not run cost more than the code. With a bias, steps
// have 64 keys and the registers that frees hold the bias of a step: it is read straight into the places of the
// accumulators while the product is made; a bias of halves comes by TMA instead, 128 keys at once. Dropout draws its
// bits under the products too.
//
// The row maximum is only a guard against overflow: any m within 2^127 of the scores gives the same result up to
// rounding. It is taken from the first step in which a row sees a key and then kept; the sum of a step, needed anyway,
// tells when it has become too small (GROW), and then P, the sum and O are divided by a power of two. What a row gets
// depends on its own visible scores alone, not on the other rows of its warp.
//
// An item whose output is not finite is noted. From the first on, its block looks at the maximum of every step, raises
// it where a sum would overflow under the kept one, and takes that item again in its stream: a jump of the scores is
// all that most suffer from. Where O leaves by TMA, it begins the next launches that way, too. What is not finite then
// is done again when all else is done, carefully: the same products in the same order, but with the elements of V that
// are not finite replaced by 0 and then added to the rows that see them, and with the maximum raised as above. So rows
// that see nothing of the kind get the very bits of a clean run, and clean inputs pay for one test of O. A bias of -inf
// masks by itself as long as the product is finite; what a product that is not leaves behind ends in the careful path,
// too, where it is selected. A row is dead when it has no maximum at its end and saw no key while it had none: `alive`.
//
// Rooms: hopper_forward_call.cuh (a launch, shared memory), _producer (warpgroup 0), _consumer (products and steps),
// _parts (the same at width 64), _softmax, _extras, _output and _careful.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CUH
#include "kernels/cuda/hopper_forward_careful.cuh"
#include "kernels/cuda/hopper_forward_consumer.cuh"
#include "kernels/cuda/hopper_forward_extras.cuh"
#include "kernels/cuda/hopper_forward_output.cuh"
#include "kernels/cuda/hopper_forward_parts.cuh"
#include "kernels/cuda/hopper_forward_producer.cuh"
#include "kernels/cuda/hopper_forward_softmax.cuh"

template <class SHAPE>
__global__ void __launch_bounds__(FORWARD_THREADS, SHAPE::blocks)
    hopper_forward_kernel(const __grid_constant__ forward_call c) {
  forward_shared<SHAPE> &shared = hopper_block_memory_as<forward_shared<SHAPE>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < SHAPE::q_slots; i++) {
      mbarrier_init(shared_address(&shared.q_full[i]), 1);
      mbarrier_init(shared_address(&shared.q_empty[i]), FORWARD_CONSUMERS * 4);
    }
    for (int i = 0; i < FORWARD_STAGES; i++) {
      mbarrier_init(shared_address(&shared.k_full[i]), 1);
      mbarrier_init(shared_address(&shared.k_empty[i]), FORWARD_CONSUMERS * 4);
      mbarrier_init(shared_address(&shared.v_full[i]), 1);
      mbarrier_init(shared_address(&shared.v_empty[i]), FORWARD_CONSUMERS * 4);
    }
    if constexpr (SHAPE::stages_bias) {
      mbarrier_init(shared_address(&shared.bias_full), 1);
      mbarrier_init(shared_address(&shared.bias_empty), FORWARD_CONSUMERS * 4);
    }
    mbarrier_init(shared_address(&shared.found), 1);
    mbarrier_init(shared_address(&shared.asked), 1);
    mbarrier_init_fence();
    shared.wary = FORWARD_NEVER;
    shared.flagged = -1;
    for (int i = 0; i < FORWARD_ITEMS; i++) shared.flagged_number[i] = shared.again[i] = 0;
    for (int i = 0; i < 2 * SHAPE::keys / 32; i++) shared.poisoned[0][i] = 0;
  }
  if (threadIdx.x < SHAPE::value_width / 2) shared.zeros[threadIdx.x] = 0;
  async_proxy_fence();
  __syncthreads();
  if (threadIdx.x < FORWARD_WARPGROUP) {
    registers_give_back<SHAPE::producer_registers>();
    if (threadIdx.x < 32) {
      forward_loader<SHAPE>(c, shared).run();
    } else if (threadIdx.x < 64) {
      forward_finder<SHAPE>(c, shared).run();
    } else {
      forward_fill_dead(c, shared_address(shared.zeros), threadIdx.x / 32 - 2, 2);
    }
  } else {
    registers_take<SHAPE::consumer_registers>();
    forward_consumer<SHAPE> consumer(c, shared);
    if constexpr (SHAPE::blocks > 1) {
      consumer.run_parts();
    } else {
      consumer.run();
    }
    named_barrier_meet(FORWARD_ALL_DONE, FORWARD_DONE_THREADS);
    if (shared.wary != FORWARD_NEVER) consumer.run_careful();
    bulk_wait_read<0>();
  }
}

// Instantiated in the hopper_forward_*.cu, side by side as long as they take to compile.
template <class SHAPE>
int hopper_forward_launch(const char *function, const forward_call &c, int blocks, cudaStream_t stream) {
  return sa_cuda_launch(function, hopper_forward_kernel<SHAPE>, dim3(blocks), dim3(FORWARD_THREADS),
                        sizeof(forward_shared<SHAPE>), stream, c);
}

#endif
