// whether attention is asked to end early; polled by its kernels, set from a signal handler
#ifndef SAFEATTN_INTERRUPT_H
#define SAFEATTN_INTERRUPT_H
#include <stdatomic.h>
#include <stdbool.h>

extern __attribute__((visibility("hidden"))) atomic_bool sa_interrupt_flag;

// Outputs of a kernel that saw this are unfinished: its caller asks again at the end.
static inline bool sa_interrupt_pending(void) {
  return atomic_load_explicit(&sa_interrupt_flag, memory_order_relaxed);
}

#endif
