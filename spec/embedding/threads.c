// several Lua states in several threads of one process: each runs the script, all must print the same
#include <lauxlib.h>
#include <lualib.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STATES_AT_MOST = 64 };

static const char *script;

// The script's result as a string that the caller frees; NULL, and a message, when it failed.
static void *run_state(void *unused) {
  lua_State *L = luaL_newstate();
  if (!L) return NULL;
  luaL_openlibs(L);
  char *result = NULL;
  if (luaL_loadfile(L, script) || lua_pcall(L, 0, 1, 0))
    fprintf(stderr, "%s\n", lua_tostring(L, -1));
  else
    result = strdup(lua_tostring(L, -1));
  lua_close(L);
  return result;
}

static const char count[] =
    "package.path = 'lua/?.lua;lua/?/init.lua;' .. package.path\n"
    "local core = require 'safeattn.core'\n"
    "local use = core.ffi.new 'sa_memory_use'\n"
    "core.lib.sa_memory(use)\n"
    "return string.format('%d bytes in %d blocks are left', tonumber(use.bytes), tonumber(use.blocks))\n";

// What states that have ended left behind.
static void print_left(void) {
  lua_State *L = luaL_newstate();
  if (!L) return;
  luaL_openlibs(L);
  luaL_dostring(L, count);
  printf("%s\n", lua_tostring(L, -1));
  lua_close(L);
}

int main(int argc, char **argv) {
  const int states = argc == 3 ? atoi(argv[2]) : 0;
  if (states < 1 || states > STATES_AT_MOST) {
    fprintf(stderr, "usage: threads script.lua states\n");
    return 2;
  }
  script = argv[1];
  pthread_t threads[STATES_AT_MOST];
  char *results[STATES_AT_MOST];
  for (int k = 0; k < states; k++) {
    if (pthread_create(&threads[k], NULL, run_state, NULL)) return 2;
  }
  for (int k = 0; k < states; k++) pthread_join(threads[k], (void **)&results[k]);
  int different = 0;
  for (int k = 0; k < states; k++) {
    different += !results[k] || !results[0] || strcmp(results[0], results[k]) != 0;
  }
  printf("%s\n%d of %d differ\n", results[0] ? results[0] : "nothing", different, states);
  for (int k = 0; k < states; k++) free(results[k]);
  print_left();
  return different != 0;
}
