// the flag that ends attention early, and the handler of Ctrl-C that sets it for a prompt
#include "interrupt.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>

#include "status.h"

atomic_bool sa_interrupt_flag;

void sa_interrupt(bool on) {
  atomic_store(&sa_interrupt_flag, on);
}

bool sa_interrupted(void) {
  return atomic_load(&sa_interrupt_flag);
}

static void on_interrupt(int signal) {
  atomic_store(&sa_interrupt_flag, true);
}

int sa_catch_interrupts(bool on) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static struct sigaction before;
  static bool caught;
  int status = SA_OK;
  pthread_mutex_lock(&lock);
  if (on != caught) {
    // No SA_RESTART: a read that waits for a line ends too.
    struct sigaction action = {.sa_handler = on_interrupt};
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGINT, on ? &action : &before, on ? &before : NULL)) {
      status = sa_fail(SA_UNSUPPORTED, __func__, "the system refused: %s", strerror(errno));
    } else {
      caught = on;
    }
  }
  pthread_mutex_unlock(&lock);
  return status;
}
