// the one public header: masked-safe attention, forward and backward, in C and (the same text) in LuaJIT's ffi.cdef
#ifndef SAFEATTN_H
#define SAFEATTN_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)
// cdef: everything from here to the closing mark is what LuaJIT reads; it holds no macros

/*  1. How to read this header
 *
 *  A program makes tensors (2), describes a mask (3), fills one `sa_attention` and calls `sa_forward` and `sa_backward`
 *  (4). The rest is what a small model needs around attention (5) and what a host wants to know (6).
 *  `examples/c/minimal.c` is the whole of it in a page.
 *
 *  Every function that can fail returns a status: 0, or one of the codes below, with the sentence that says which
 *  argument was wrong, what came and what was wanted in `sa_last_error()`, which belongs to the calling thread and is
 *  valid until that thread's next failing call. A call that fails has changed nothing that it was given.
 *
 *  Dims, batches, heads and positions count from 0 here (and from 1 in Lua). Sizes are 64-bit. The caller owns every
 *  struct; what a function creates, the caller releases. All functions may be called from several threads at once, on
 *  different outputs.
 */

typedef enum sa_status {
  SA_OK = 0,
  SA_INVALID = 1,      // an argument is wrong
  SA_NO_MEMORY = 2,    // an allocation was refused
  SA_NO_DEVICE = 3,    // the device, or this build's support of it, is not there
  SA_UNSUPPORTED = 4,  // legal, but not on this device or back end
  SA_INTERRUPTED = 5   // sa_interrupt() asked for it
} sa_status;

enum {
  SA_ABI = 2,       // rises with every change of this header that old callers would notice
  SA_MAX_DIMS = 8,  // a tensor has at most so many dims
  SA_TILE = 128     // masks are compiled to tiles of SA_TILE x SA_TILE pairs
};

int sa_abi(void);                 // SA_ABI of the library that was loaded
const char *sa_version(void);     // "0.1.0"
const char *sa_last_error(void);  // "sa_forward: k: has 3 heads, wanted a divisor of q's 8"; "" when nothing failed yet
const char *sa_status_name(int status);

/*  2. Tensors
 *
 *  A tensor is a descriptor: a strided window on a block of memory. Blocks are counted: every view holds its block, and
 *  the memory goes when the last holder is released. Descriptors are plain structs, copied as you like, but each copy
 *  that lives on its own needs `sa_tensor_retain`.
 */

typedef enum sa_dtype { SA_F32 = 0, SA_F64 = 1, SA_F16 = 2, SA_BF16 = 3, SA_BOOL = 4, SA_I32 = 5, SA_I64 = 6 } sa_dtype;

enum { SA_CPU = 0, SA_CUDA = 1 };  // a device: SA_CPU, or SA_CUDA + k for the k-th GPU

typedef struct sa_block sa_block;

typedef struct sa_tensor {
  sa_block *block;  // holds the memory; NULL: the memory is borrowed and the caller keeps it alive
  void *data;       // the first element; NULL only in a descriptor that holds nothing yet
  int32_t dtype;    // sa_dtype
  int32_t device;
  int32_t ndim;  // 0 is a scalar
  int32_t reserved;
  int64_t shape[8];
  int64_t stride[8];  // in elements; 0 repeats an element, negative is not used
} sa_tensor;

// Creation. `shape` has ndim counts >= 0. The memory is aligned to 64 bytes; `sa_tensor_new` leaves it unset.
int sa_tensor_new(sa_tensor *out, int dtype, int device, int ndim, const int64_t *shape);
int sa_tensor_borrow(sa_tensor *out, void *data, int dtype, int device, int ndim, const int64_t *shape,
                     const int64_t *stride);  // stride NULL: row-major; takes no ownership of data
void sa_tensor_retain(const sa_tensor *t);
void sa_tensor_release(sa_tensor *t);  // drops the hold and empties the descriptor; releasing an empty one is fine
// For a binding that learns late which descriptors are gone: drops the holds of their blocks (NULL: none), and empties
// the list.
void sa_blocks_release(sa_block **blocks, int64_t count);

int64_t sa_tensor_numel(const sa_tensor *t);
int64_t sa_dtype_size(int dtype);      // bytes
const char *sa_dtype_name(int dtype);  // "f32"
bool sa_tensor_contiguous(const sa_tensor *t);
// Half-open byte range [*first, *last) of memory the tensor's elements lie in.
void sa_tensor_extent(const sa_tensor *t, const char **first, const char **last);

// Views: `out` becomes a new holder of the same block. `out` may not be `t`.
int sa_tensor_view(sa_tensor *out, const sa_tensor *t, int ndim, const int64_t *shape);  // one count may be -1
int sa_tensor_permute(sa_tensor *out, const sa_tensor *t, const int32_t *dims);
int sa_tensor_narrow(sa_tensor *out, const sa_tensor *t, int dim, int64_t start, int64_t count);
int sa_tensor_select(sa_tensor *out, const sa_tensor *t, int dim, int64_t index);
int sa_tensor_expand(sa_tensor *out, const sa_tensor *t, int ndim, const int64_t *shape);  // -1 keeps a dim's size

// Contents. `sa_copy` casts between all dtypes (to nearest, ties to even, in one rounding; to integers it truncates and
// saturates, NaN to 0; to bool: not zero) and broadcasts `from` over `to`. When the two overlap, `to` gets what `from`
// held before, by way of a copy. A tensor whose elements share memory (an expanded one) cannot be written. A fill or a
// set of an integer tensor takes only whole numbers that it can hold; `sa_arange` likewise.
int sa_copy(sa_tensor *to, const sa_tensor *from);
int sa_fill(sa_tensor *t, double value);
// `sa_get` and `sa_get_all` (every element, in row-major order) give each NaN as the one positive quiet NaN, because
// LuaJIT keeps pointers in the bits of others.
int sa_get(const sa_tensor *t, const int64_t *index, double *value);
int sa_get_all(const sa_tensor *t, double *values);
int sa_get_integer(const sa_tensor *t, const int64_t *index, int64_t *value);  // exact; a float must be whole
int sa_set(sa_tensor *t, const int64_t *index, double value);
int sa_set_integer(sa_tensor *t, const int64_t *index, int64_t value);
int sa_arange(sa_tensor *t, double start, double step);  // along the row-major order of t
// Philox4x32-10 of (seed, linear index): uniform on [0, 1) with 24 bits (53 for f64), or normal by Box-Muller. The
// values depend on seed and index alone, so every device draws the same.
int sa_rand(sa_tensor *t, uint64_t seed);
int sa_randn(sa_tensor *t, uint64_t seed);

typedef struct sa_stats {
  double min, max, mean, norm;  // over the finite elements; norm is Euclidean; min, max, mean NaN when there are none
  int64_t count, nan, posinf, neginf, zero;  // count: of all elements
} sa_stats;
int sa_tensor_stats(const sa_tensor *t, sa_stats *out);
// *result: 1 when shapes, dtypes and values agree (NaN equals nothing, -0 equals 0), else 0. Any device.
int sa_equal(const sa_tensor *a, const sa_tensor *b, int *result);
// |a - b| <= atol + rtol |b| for every pair; infinities must be equal, NaN passes only against NaN and on request. One
// shape, any dtypes and devices.
int sa_allclose(const sa_tensor *a, const sa_tensor *b, double atol, double rtol, bool equal_nan, int *result);

// Bytes that blocks hold on the CPU, and how many blocks there are.
typedef struct sa_memory_use {
  int64_t bytes, blocks, peak_bytes, internal_bytes;  // internal: plans, masks, scratch
} sa_memory_use;
void sa_memory(sa_memory_use *out);
void sa_memory_reset_peak(void);
// For tests: the calling thread's n-th allocation from now (1 = the next) fails, once; 0 turns it off. Returns how many
// allocations this thread has made since the last call.
int64_t sa_memory_fail(int64_t n);

/*  3. Masks
 *
 *  A mask is an immutable expression that says, for a query i and a key j of batch b and head h, whether the pair is
 *  visible. It is compiled for (B, H, L, S) when attention first needs it, and the compiled plan stays with the mask.
 *  Constructors copy what they read. Combining masks holds the parts, so parts may be released after.
 */

typedef struct sa_mask sa_mask;

typedef enum sa_align { SA_NO_CAUSAL = 0, SA_TOP_LEFT = 1, SA_BOTTOM_RIGHT = 2 } sa_align;

int sa_mask_all(sa_mask **out);
int sa_mask_none(sa_mask **out);
int sa_mask_causal(sa_mask **out, int align);  // j <= i, or j - i <= S - L
// -left <= j - i - d <= right, d = S - L for SA_BOTTOM_RIGHT, else 0; a negative left or right is unbounded.
int sa_mask_window(sa_mask **out, int64_t left, int64_t right, int align);
// Batch b sees keys j < key_lengths[b] from queries i < query_lengths[b] (NULL: all queries); count must be B, or 1.
int sa_mask_padding(sa_mask **out, const int64_t *key_lengths, const int64_t *query_lengths, int64_t count);
// ids i32 or i64 [S] or [B,S]; visible when the ids of query and key agree and are not negative. query_ids NULL: the
// same ids for both, L must equal S.
int sa_mask_documents(sa_mask **out, const sa_tensor *query_ids, const sa_tensor *key_ids);
int sa_mask_prefix(sa_mask **out, const int64_t *counts, int64_t count);  // j < counts[b]
int sa_mask_global(sa_mask **out, int64_t count);                         // i < count or j < count
// keep: bool [..,ceil(L/size),ceil(S/size)], or 1 for any of its dims.
int sa_mask_blocks(sa_mask **out, const sa_tensor *keep, int64_t size);
int sa_mask_dense(sa_mask **out, const sa_tensor *visible);  // bool, broadcast to [B,H,L,S]; packed to bits at once
int sa_mask_additive(sa_mask **out, const sa_tensor *bias, double at_most);  // masked where bias <= at_most
int sa_mask_random(sa_mask **out, double probability, uint64_t seed);        // of (i, j) alone, alike for all b and h
// Bits to be filled row by row (what Lua's mask.fn uses): batch and heads are 1 when the mask does not depend on them.
// A row is filled once, before the mask is used or combined; rows never filled are masked.
int sa_mask_bits(sa_mask **out, int64_t batch, int64_t heads, int64_t queries, int64_t keys);
int sa_mask_bits_row(sa_mask *mask, int64_t batch, int64_t head, int64_t query, const uint8_t *visible);
int sa_mask_and(sa_mask **out, const sa_mask *a, const sa_mask *b);
int sa_mask_or(sa_mask **out, const sa_mask *a, const sa_mask *b);
int sa_mask_not(sa_mask **out, const sa_mask *a);
void sa_mask_retain(const sa_mask *mask);
void sa_mask_release(sa_mask *mask);  // NULL is fine

// The compiled form, for (batch, heads, queries, keys). What is in it: src/plan.h.
typedef struct sa_plan sa_plan;
// Causality and window as in sa_attention, ANDed in; mask NULL: all. *out is held for the caller: release it.
int sa_mask_plan(const sa_plan **out, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right,
                 int64_t batch, int64_t heads, int64_t queries, int64_t keys);
void sa_plan_release(const sa_plan *plan);

typedef struct sa_plan_counts {
  int64_t batch, heads, queries, keys;  // batch and heads are 1 when the mask does not depend on them
  int64_t visible;                      // pairs
  int64_t empty, partial, full;         // tiles
  int64_t dead_rows, dead_keys;
  int64_t bytes, patterns;
} sa_plan_counts;
void sa_plan_count(const sa_plan *plan, sa_plan_counts *out);
// Bool tensors, created: the pairs [batch,heads,queries,keys], rows without a key [batch,heads,queries], keys that no
// row sees [batch,heads,keys], with the plan's own batch and heads.
int sa_plan_dense(const sa_plan *plan, sa_tensor *out);
int sa_plan_dead_rows(const sa_plan *plan, sa_tensor *out);
int sa_plan_dead_keys(const sa_plan *plan, sa_tensor *out);
bool sa_plan_visible(const sa_plan *plan, int64_t batch, int64_t head, int64_t query, int64_t key);
// For pictures: how many pairs are visible in each cell of a plane cut into `rows` x `columns` cells (at most queries x
// keys), row-major; cell r of n over a size begins at floor(r * size / n). Walks over the tiles, not over the pairs.
int sa_plan_coverage(const sa_plan *plan, int64_t batch, int64_t head, int64_t rows, int64_t columns, int64_t *visible);

/*  4. Attention
 *
 *      s_ij = scale * (q_i . k_j)                  s_ij = softcap * tanh(s_ij / softcap)   when softcap > 0
 *      s_ij = s_ij + bias_ij - slope_h * |j-i-d|   d = S - L when causal is SA_BOTTOM_RIGHT, else 0
 *      p_ij = exp(s_ij - lse_i) over visible pairs, 0 for masked ones;  o_i = sum_j p_ij v_j
 *
 *  A pair is masked when the mask, causality or the window say no, or when bias_ij is -inf. A masked pair has no
 *  influence: not on the output, not on a gradient, not through NaN or Inf. A row that sees nothing gives o = 0,
 *  lse = -inf (its sink, if there are sinks) and adds nothing to any gradient.
 *
 *  Shapes: q [B,H,L,E], k [B,Hkv,S,E], v [B,Hkv,S,Ev]; H a multiple of Hkv, query head h reads key head h / (H/Hkv).
 *  Ranks 3 ([H,L,E]) and 2 ([L,E]) give outputs of rank 3 and 2. q, k, v have one dtype: f32, f64, f16 or bf16; scores,
 *  softmax and sums run in f32 (f64 for f64). Rows with unit stride are read in place, others are copied once.
 */

typedef enum sa_backend_choice { SA_AUTO = 0, SA_REFERENCE = 1, SA_FUSED = 2 } sa_backend_choice;

typedef struct sa_attention {
  const sa_tensor *q, *k, *v;
  const sa_tensor *bias;              // broadcast to [B,H,L,S], q's dtype or f32; or NULL
  const sa_tensor *sinks;             // [H], q's dtype or f32: a logit in the denominator only; or NULL
  const sa_tensor *alibi;             // slopes [H], q's dtype or f32; or NULL
  const sa_mask *mask;                // or NULL
  int64_t window_left, window_right;  // negative: unbounded
  double scale;                       // used when has_scale
  double softcap;                     // 0: off
  double dropout;                     // probability in [0, 1) of dropping a weight, after the softmax
  uint64_t seed;                      // of the dropout
  int32_t causal;                     // sa_align
  int32_t has_scale;                  // 0: 1/sqrt(E)
  int32_t backend;                    // sa_backend_choice
  int32_t deterministic;              // 1: the same bits every time (the CPU always is)
  // Forward: an output given with data NULL is created; one with data is written in place. NULL pointers are not
  // wanted.
  sa_tensor *out;      // [B,H,L,Ev], q's dtype; required
  sa_tensor *lse;      // [B,H,L], f32, f64 for f64; backward needs it
  sa_tensor *weights;  // p_ij [B,H,L,S], q's dtype, before dropout
  sa_tensor *dead;     // bool [B,H,L]: rows that saw nothing; backward needs it when there is a bias
  // Backward: reads out, lse and dead of the forward, and writes the gradients that are wanted.
  const sa_tensor *dout;                              // like out; NULL: zeros
  const sa_tensor *dlse;                              // like lse; NULL: zeros
  sa_tensor *dq, *dk, *dv, *dbias, *dsinks, *dalibi;  // shape and dtype of what they are the gradient of
  // What served the call.
  int32_t used;     // SA_REFERENCE or SA_FUSED
  char kernel[36];  // "fused-f32-avx512"
} sa_attention;

void sa_attention_init(sa_attention *a);  // all NULL and 0, windows unbounded, deterministic
int sa_forward(sa_attention *a);
int sa_backward(sa_attention *a);

// Attention over parts of the keys, merged: lse = log sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p. A part
// whose lse is -inf is not read. out and lse are created when their data is NULL.
int sa_merge(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, sa_tensor *out, sa_tensor *lse);
// Given the gradients of out and lse (NULL: zeros), those of each part.
int sa_merge_backward(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
                      const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse, sa_tensor *const *douts,
                      sa_tensor *const *dlses);

// Softmax along `dim` of any float tensor. A row of nothing but -inf is dead and gives 0, NaN or 1/n. -inf entries are
// masked: they have no influence on the gradient of the row, and get 0.
typedef enum sa_dead_rows { SA_ZERO = 0, SA_NAN = 1, SA_UNIFORM = 2 } sa_dead_rows;
int sa_softmax(const sa_tensor *x, int dim, int dead_rows, sa_tensor *y);
int sa_softmax_backward(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                        sa_tensor *dx);

/*  5. What a small model needs around attention
 *
 *  Outputs are created when their data is NULL, else they must have the right shape and dtype; they may be an input, or
 *  overlap one (which then costs a copy). Inputs broadcast as in NumPy. Half types are computed in f32. Integers take
 *  part only where it is said.
 */

typedef enum sa_unary_op {
  SA_NEG = 0,
  SA_EXP = 1,
  SA_LOG = 2,
  SA_SQRT = 3,
  SA_TANH = 4,
  SA_RELU = 5,
  SA_GELU = 6,
  SA_ABS = 7
} sa_unary_op;
typedef enum sa_binary_op {
  SA_ADD = 0,
  SA_SUB = 1,
  SA_MUL = 2,
  SA_DIV = 3,  // all dtypes but bool; integers wrap around, their quotient is cut towards 0 and x / 0 saturates
  SA_LT = 4,
  SA_LE = 5,
  SA_GT = 6,
  SA_GE = 7,
  SA_EQ = 8,
  SA_NE = 9  // give bool
} sa_binary_op;
typedef enum sa_reduce_op { SA_SUM = 0, SA_MEAN = 1, SA_MAX = 2, SA_MIN = 3, SA_ARGMAX = 4 } sa_reduce_op;

int sa_unary(int op, const sa_tensor *x, sa_tensor *y);  // gelu is the exact one: x/2 (1 + erf(x/sqrt 2))
// dx from dy and what the op keeps: y for exp, sqrt and tanh, nothing for neg, else x. What is not read may be NULL.
int sa_unary_backward(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, sa_tensor *dx);
int sa_binary(int op, const sa_tensor *a, const sa_tensor *b, sa_tensor *y);  // equal dtypes
// b as a number of a's dtype (in f32 for half types); b op a when scalar_first.
int sa_binary_scalar(int op, const sa_tensor *a, double b, bool scalar_first, sa_tensor *y);
int sa_where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, sa_tensor *y);  // condition bool
// Over the dims whose bit is set in `dims`, kept as 1 when keep. Sums run in f64 in a fixed order; those of integers
// and bool are exact and give i64. A mean takes floats. NaN wins a max or min, which want at least one element.
// SA_ARGMAX takes one dim and gives i64, the first of equals (NaN is the greatest), counted from 0.
int sa_reduce(int op, const sa_tensor *x, uint32_t dims, bool keep, sa_tensor *y);
int sa_matmul(const sa_tensor *a, const sa_tensor *b, sa_tensor *y);  // [..,M,K] x [..,K,N], batches broadcast; floats
// Normalises the last dim: y = (x - mean) / sqrt(variance + epsilon) * weight + bias; weight and bias [n] or NULL.
int sa_layernorm(const sa_tensor *x, const sa_tensor *weight, const sa_tensor *bias, double epsilon, sa_tensor *y);
int sa_layernorm_backward(const sa_tensor *x, const sa_tensor *weight, double epsilon, const sa_tensor *dy,
                          sa_tensor *dx, sa_tensor *dweight, sa_tensor *dbias);  // unwanted ones NULL
// y[..,:] = table[ids[..] - base,:]; ids i32 or i64. The backward adds up dy in order of ids, into a dtable that is
// given and overwritten.
int sa_embedding(const sa_tensor *table, const sa_tensor *ids, int64_t base, sa_tensor *y);
int sa_embedding_backward(const sa_tensor *ids, int64_t base, const sa_tensor *dy, sa_tensor *dtable);
// -log softmax(x)[id] per row of x [..,n]: loss [..] in x's dtype; ids equal to `ignore` give 0.
int sa_cross_entropy(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore, sa_tensor *loss);
int sa_cross_entropy_backward(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                              const sa_tensor *dloss, sa_tensor *dx);
// One AdamW step in place: parameter, and its two moments, contiguous, f32 or f64.
typedef struct sa_adamw_options {
  double rate, beta1, beta2, epsilon, weight_decay;
  int64_t step;  // 1 at the first
} sa_adamw_options;
int sa_adamw(sa_tensor *parameter, const sa_tensor *gradient, sa_tensor *moment1, sa_tensor *moment2,
             const sa_adamw_options *options);

/*  6. The host
 *
 *  The environment is read once, at first use: SAFEATTN_THREADS, SAFEATTN_ISA (generic, avx2, avx512, amx).
 */

typedef struct sa_host_info {
  int32_t threads;   // that a call may use
  int32_t cores;     // in the affinity mask
  char isa[16];      // "avx512"
  char isas[64];     // all that this machine can run: "generic avx2 avx512 amx"
  char blas[96];     // "not loaded", or what it calls itself
  const char *cuda;  // what the CUDA part says: devices, or why there are none; it lasts
} sa_host_info;
void sa_info(sa_host_info *out);
int sa_threads(int threads);  // > 0 sets how many the calling thread's calls may use; returns the number in force
// "generic", "avx2", "avx512", "amx" or "auto", for tests. SA_UNSUPPORTED: the machine has it not.
int sa_set_isa(const char *name);
int sa_device_count(int kind);  // SA_CPU: 1; SA_CUDA: devices that can be used
// For prompts. While the flag is on, sa_forward and sa_backward end with SA_INTERRUPTED, those at work too, in every
// thread; what they created is released, an output that was given is left unfinished. Safe in a signal handler. Turn it
// off when the calls have returned.
void sa_interrupt(bool on);
bool sa_interrupted(void);
int sa_catch_interrupts(bool on);  // SIGINT (Ctrl-C) turns the flag on, or does again what it did before
// For measurements: fused multiply-adds per second, in flops, that the calling thread's threads did together in a few
// milliseconds, for f32 or f64 on the ISA in force.
double sa_measure_peak(int dtype);
// Likewise: bytes per second that they read together from memory at best, 0 when there is none to read.
double sa_measure_read(void);

/*  7. Devices
 *
 *  CUDA devices are served by a library of their own, cuda.so, which is looked for beside this one (SAFEATTN_CUDA_LIB
 *  names another) when a device is first asked for. Where it, a driver or a device is missing, the rest works, and
 *  sa_info() says what is missing.
 *
 *  What is asked of a device is put into a stream and done in its order; functions that give numbers to the host wait
 *  for them. Every thread has a current stream for each device; at first that is CUDA's own default stream, which other
 *  libraries use as well, so that their work and this library's follow each other unasked. A tensor may be used on any
 *  stream, but the program sees to it that what it reads has been written.
 *
 *  Memory of a device that is released is kept for the next tensor, up to half of what the device has.
 */

// Waits until the device has done all that was asked of it. SA_CPU: nothing to wait for.
int sa_synchronize(int device);

typedef struct sa_device_memory {
  int64_t bytes, blocks, peak_bytes;  // held by tensors and by calls at work
  int64_t cached_bytes;               // released, kept for the next
  int64_t free_bytes, total_bytes;    // what the device says of itself
} sa_device_memory;
int sa_cuda_memory(int device, sa_device_memory *out);
int sa_cuda_empty_cache(int device);  // gives what is kept back to the device
int64_t sa_device_bytes(void);        // that blocks hold on all devices but the CPU

// A stream is a cudaStream_t; NULL is CUDA's default stream. A new one does not wait for the default stream. Any stream
// of the process may be used, also one that another library made: it must stay alive until it is told to be released
// here, which destroys those that sa_cuda_stream_new made and forgets the others. At most 32 at a time on a device.
int sa_cuda_stream_new(int device, void **stream);
int sa_cuda_stream_use(int device, void *stream);  // for the calling thread, from now on
int sa_cuda_stream(int device, void **stream);     // the calling thread's current one
int sa_cuda_stream_synchronize(int device, void *stream);
int sa_cuda_stream_release(int device, void *stream);

// cdef: end
#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
