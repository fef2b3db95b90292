// an ISA's entry in the CPU's table, after both reals; TIER is its name
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define PASTE_OF(a, b) a##b
#define PASTE(a, b) PASTE_OF(a, b)

// Reads memory in so many places at once and does no more with it than that it cannot be left out.
static void read_memory(const void *memory, int64_t bytes, int places) {
  typedef uint64_t words __attribute__((vector_size(VECTOR_BYTES)));
  const int64_t apart = bytes / places;
  words sum[4] = {0};
  for (int64_t at = 0; at < apart; at += sizeof sum) {
    for (int place = 0; place < places; place++) {
      const words *from = (const void *)((const char *)memory + place * apart + at);
      for (int i = 0; i < 4; i++) sum[i] |= from[i];
    }
  }
  sum[0] |= sum[1] | sum[2] | sum[3];
  __asm__ volatile("" ::"r"(&sum) : "memory");
}

static double multiply(int dtype) {
  return dtype == SA_F64 ? multiply_f64() : multiply_f32();
}

const sa_cpu_kernels PASTE(sa_cpu_, TIER) = {
    .fused = {[SA_F32] = {"fused-f32-" TEXT(TIER), forward_f32, backward_f32},
              [SA_F64] = {"fused-f64-" TEXT(TIER), forward_f64, backward_f64},
              [SA_F16] = {"fused-f16-" TEXT(TIER), forward_f32, backward_f32},
              [SA_BF16] = {"fused-bf16-" TEXT(TIER), forward_f32, backward_f32}},
    .multiply = multiply,
    .read_memory = read_memory,
};
