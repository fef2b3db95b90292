// what the backward pass has to know of each query beforehand: base and factor of its weights, delta, its sink's share
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_ROWS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_ROWS_CUH
#include "kernels/cuda/portable_backward_steps.cuh"
#include "kernels/cuda/portable_scores.cuh"

// An LSE beyond 1024 has an error of 6e-5 in f32, which the weights would inherit (and one of -3e38, the bias's doing,
// has no digit for the number of keys).
static __device__ __forceinline__ bool is_coarse(double lse) {
  return fabs(lse) > 1024 && lse - lse == 0;
}

// Sums over LANES neighbouring lanes, in one order for all.
template <int LANES, class Real>
static __device__ __forceinline__ Real over_lanes(Real x) {
  for (int distance = LANES / 2; distance; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// What a lane has of the product of two rows: a chunk of 16 bytes in LANES, or an element where rows are not aligned.
template <int LANES, class Element, class Real>
static __device__ __forceinline__ Real multiply_share(const Element *a, const Element *b, int64_t width, bool aligned,
                                                      int lane) {
  constexpr int EACH = 16 / sizeof(Element);
  struct alignas(16) chunk {
    Element x[EACH];
  };
  Real sum = 0;
  const int64_t chunks = aligned ? width / EACH : 0;
#pragma unroll 4
  for (int64_t k = lane; k < chunks; k += LANES) {
    const chunk x = ((const chunk *)a)[k], y = ((const chunk *)b)[k];
#pragma unroll
    for (int n = 0; n < EACH; n++) sum += real_of(x.x[n]) * real_of(y.x[n]);
  }
  for (int64_t d = chunks * EACH + lane; d < width; d += LANES) sum += real_of(a[d]) * real_of(b[d]);
  return sum;
}

// A base of f32 or f64 becomes a whole number, 0 where it was 0 to 8 and else up to 8 less, and a factor.
template <class Real>
static __device__ __forceinline__ void part_base(double lse, bool natural, Real &base, Real &factor) {
  base = rint(base - fmin(fmax(base, (Real)0), (Real)8));
  // ln 2 in two parts.
  const double rest =
      natural ? base - lse : fma((double)base, 0.6931471805599453, -lse) + base * 2.3190468138462996e-17;
  factor = (Real)exp(rest);
}

// Block `index` of BACKWARD_BLOCK queries of a head, LANES lanes one at a time: 32 read rows at the speed of memory,
// fewer wait for it less often. Returns whether some LSE is too coarse. All that a query needs is asked for at once.
template <class Element, class Real, int LANES>
static __device__ __forceinline__ bool prepare_block(const sa_problem &p, const sa_device_plan &plan,
                                                     const backward_rows<Real> &rows, bool aligned, int64_t index) {
  const int lane = threadIdx.x % LANES;
  const int64_t blocks = rows.padded / BACKWARD_BLOCK, plane = index / blocks, batch = plane / p.heads,
                head = plane % p.heads, first = index % blocks * BACKWARD_BLOCK;
  const uint64_t *dead_bits = plan.dead_rows + sa_device_plane(plan, batch, head) * ((p.queries + 63) / 64);
  const double natural = plain_scores(p) ? 1.4426950408889634 : 1;
  const double sink = p.sinks.data ? (double)(Real)read_operand(p.sinks, head * p.sinks.stride[1]) : -INFINITY;
  bool coarse = false;
  for (int64_t query = first + threadIdx.x / LANES; query < first + BACKWARD_BLOCK; query += blockDim.x / LANES) {
    const int64_t at = plane * rows.padded + query;
    bool dead = true;
    double lse = 0, dlse = 0;
    Real product = 0;
    if (query < p.queries) {
      dead = p.bias.data ? ((const bool *)p.dead.data)[row_offset(p.dead, batch, head, query)]
                         : dead_bits[query / 64] >> (query % 64) & 1;
      lse = read_operand(p.lse, row_offset(p.lse, batch, head, query));
      if (p.dlse.data) dlse = read_operand(p.dlse, row_offset(p.dlse, batch, head, query));
      if (p.dout.data)
        product = multiply_share<LANES, Element, Real>(
            (const Element *)p.out.data + row_offset(p.out, batch, head, query),
            (const Element *)p.dout.data + row_offset(p.dout, batch, head, query), p.value_width, aligned, lane);
    }
    product = over_lanes<LANES>(product);
    Real base = INFINITY, factor = 1, delta = 0, share = 0;
    if (!dead) {
      // A row with scores that overflow is no dead row: it is NaN. Factors are finite, so that 0 stays 0.
      const bool finite = lse - lse == 0;
      base = finite ? (Real)(lse * natural) : (Real)NAN;
      if (sizeof(Element) == sizeof(Real) && finite && !is_coarse(lse)) part_base(lse, natural == 1, base, factor);
      coarse |= is_coarse(lse);
      delta = (Real)(product - dlse);
      // The sink's weight times what it costs.
      if (sink != -INFINITY) share = (Real)(-delta * exp(sink - lse));
    } else if (sink != -INFINITY) {
      // A row that sees only its sink gives it all its weight; the dO there meets o = 0, which no sink moves.
      share = (Real)dlse;
    }
    if (lane) continue;
    rows.base[at] = base;
    rows.factor[at] = factor;
    rows.delta[at] = delta;
    if (rows.sink_share) rows.sink_share[at] = share;
    if (rows.slope_share) rows.slope_share[at] = 0;
  }
  const bool any = __syncthreads_or(coarse);
  if (threadIdx.x == 0) rows.coarse[index] = any;
  return any;
}

#endif
