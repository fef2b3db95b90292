// backward attention on Hopper for heads wider than 128: TMA, wgmma and warp specialisation over the visible tiles
//
// dK and dV of 64 keys fill the registers of two warpgroups, and the sums of dQ in f32 would be 1 KiB of traffic a
// query and step of 64 keys, 64 KB against 2560 cycles of products. So there are two passes, each of which makes its
// own S and dP: seven products instead of five, but no sums in memory, no turns, nothing to convert, and the bits of a
// result are the same every time. Before them hopper_backward_rows makes the row statistics. A block per multiprocessor
// stays for the whole launch and takes jobs, the longest of a head first, from one counter, of the first pass and then
// of the second; warp 0 loads for warpgroups 1 and 2 in one stream across the jobs, and products of one warpgroup run
// under the arithmetic of the other.
//
//   keys                 A job is 64 keys of a key head with all queries that see them, 64 a step. Warpgroup 1 makes
//                        S^T = K Q^T, P^T and dV += P^T dO, warpgroup 2 dP^T = V dO^T, dS^T and dK += dS^T Q: a key per
//                        row, so that P^T and dS^T are multiplied from registers. What they exchange is P^T, in halves,
//                        each thread's to the same thread of the other.
//   queries              A job is 128 queries of a head, 64 a warpgroup, with all keys that they see, 64 a step:
//                        S = Q K^T, dP = dO V^T, dQ += dS K with dS in registers. The next S and dQ run under the
//                        arithmetic of P.
//
//   widths    registers: keys' pass   queries' pass        shared memory: keys' pass        queries' pass
//   256, 256  dV or dK 128, S or dP   dQ 128, S 32, dP 32,  K, V, 2 x (Q, dO, P^T): 211 KiB  Q, dO, 2 x K, V: 226 KiB
//   192, 192  dV or dK 96, 32, 16     dQ 96, 32, 32, 16     3 x (Q, dO): 211 KiB             3 x K, 2 x V: 221 KiB
//   192, 128  dV 64, dK 96, 32, 16    the same              3 x (Q, dO): 179 KiB             3 x K, 2 x V: 189 KiB
//
// On an H100 width 256 reaches 418 TFLOP/s of five products (585 of the seven), 1.18 times cuDNN's, and 192 516.
//
// Gradients leave through the buffers of the operands of their shape: dK through K, dV through V, dQ through Q.
//
// A result that is not finite is noted, and last launches (CAREFUL) do its job again: the same products in the same
// order, but the elements of Q, dO and K that are not finite are replaced by 0 where they are multiplied by P or dS,
// and their products then added one by one where the pair is visible. So keys and rows that see nothing of the kind
// get the very bits of a clean run; clean inputs pay for a test of the results, and, where some pair may be masked, for
// those launches.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_CUH
#include "kernels/cuda/hopper_backward_wide_keys.cuh"
#include "kernels/cuda/hopper_backward_wide_queries.cuh"

// A block goes on to the second pass when the first has no more jobs for it. Careful ones are launched one by one, as
// together they spill.
template <class SHAPE, bool CAREFUL, bool KEYS, bool QUERIES>
__global__ void __launch_bounds__(HOPPER_WIDE_THREADS, 1)
    hopper_wide_passes(const __grid_constant__ hopper_backward_call c) {
  if (CAREFUL) {
    dependency_wait();
    if (!*c.flagged) return;
  } else {
    dependents_launch();
  }
  const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  const bool keys = KEYS && (c.dk_out.data || c.dv_out.data), queries = QUERIES && c.dq_out.data;
  const uint32_t base = hopper_block_memory();
  if (threadIdx.x == 0) {
    hopper_wide_keys_memory<SHAPE, CAREFUL>::init(base);
    hopper_wide_queries_memory<SHAPE, CAREFUL>::init(base);
    mbarrier_init_fence();
  }
  if (!CAREFUL) dependency_wait();
  __syncthreads();
  // Shared memory is another's from here on.
  const auto between = []() {
    async_proxy_fence();
    named_barrier_meet(HOPPER_WIDE_BETWEEN, HOPPER_WIDE_THREADS);
  };
  if (warp < 4) {
    registers_give_back<HOPPER_WIDE_PRODUCER_REGISTERS>();
    if (keys && warp == 0) hopper_wide_load_jobs<hopper_wide_keys_producer<SHAPE, CAREFUL>>(c, base);
    between();
    if (queries && warp == 0) hopper_wide_load_jobs<hopper_wide_queries_producer<SHAPE, CAREFUL>>(c, base);
  } else {
    registers_take<HOPPER_WIDE_CONSUMER_REGISTERS>();
    if (keys && warp < 8) hopper_wide_dv<SHAPE, CAREFUL>(c, base).run();
    if (keys && warp >= 8) hopper_wide_dk<SHAPE, CAREFUL>(c, base).run();
    between();
    if (queries) hopper_wide_dq<SHAPE, CAREFUL>(c, base).run();
  }
}

// The gradients, after the row statistics.
template <class SHAPE>
int hopper_wide_launch(const char *function, const hopper_backward_call &c, int processors, cudaStream_t stream) {
  const int row_tiles = c.batch * c.heads * c.plan.row_tiles, jobs = c.jobs > row_tiles ? c.jobs : row_tiles;
  const unsigned blocks = (unsigned)(jobs < processors ? jobs : processors);
  const auto launch = [&](void (*kernel)(hopper_backward_call)) {
    return sa_cuda_launch<true>(function, kernel, blocks, HOPPER_WIDE_THREADS, HOPPER_WIDE_BYTES, stream, c);
  };
  const bool keys = c.dk_out.data || c.dv_out.data, queries = c.dq_out.data;
  int status = keys || queries ? launch(hopper_wide_passes<SHAPE, false, true, true>) : SA_OK;
  const bool leaks = hopper_backward_leaks(c);
  if (!status && keys && leaks) status = launch(hopper_wide_passes<SHAPE, true, true, false>);
  if (!status && queries && leaks) status = launch(hopper_wide_passes<SHAPE, true, false, true>);
  return status;
}

#endif
