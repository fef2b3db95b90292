// mbarriers, TMA, bulk copies and wgmma
#include "hopper.h"

#include <string.h>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulator {

// Mbarriers. The eight bytes hold the phase; waiting threads are found by the barrier's address.

struct mbarrier {
  uint64_t mark : 15, phase : 1, count : 12, pending : 12;
  int64_t bytes : 24;  // expected and not yet there; below 0 when they came before they were expected
};
static_assert(sizeof(mbarrier) == 8, "an mbarrier has eight bytes");
enum { MARK = 0x2a5b };

static mbarrier *mbarrier_at(uint32_t address) {
  if (address % 8) fail("an mbarrier at %#x, which is not a multiple of 8", address);
  mbarrier *b = (mbarrier *)shared_pointer(address, 8);
  if (b->mark != MARK) fail("%#x is not an mbarrier that was initialised", address);
  return b;
}

static void settle(block *home, mbarrier *b) {
  if (b->pending || b->bytes) return;
  b->phase ^= 1;
  b->pending = b->count;
  wake(home, b);
}

void mbarrier_init(uint32_t address, int count) {
  if (address % 8) fail("an mbarrier at %#x, which is not a multiple of 8", address);
  if (count < 1 || count > 4095) fail("an mbarrier of %d threads", count);
  mbarrier b = {};
  b.mark = MARK;
  b.count = b.pending = (unsigned)count;
  memcpy((void *)shared_pointer(address, 8), &b, 8);
}

void mbarrier_arrive(uint32_t address, int bytes) {
  mbarrier *b = mbarrier_at(address);
  b->bytes += bytes;
  b->pending--;
  settle(current()->home, b);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  mbarrier *b = mbarrier_at(address);
  while (b->phase == (parity & 1)) wait(b, parity & 1 ? "phase 1 of mbarrier" : "phase 0 of mbarrier", address);
}

void named_barrier(int id, int threads, bool waits) {
  if (id < 0 || id >= NAMED_BARRIERS || threads % WARP || threads < WARP)
    fail("named barrier %d of %d threads: 0 to 15, whole warps", id, threads);
  barrier *b = &current()->home->named[id];
  if (!arrive(b, threads) && waits) wait(b, "named barrier", (uint64_t)id);
}

// Copies to shared memory arrive when no thread can go on, or at once when copies are early.
static void load(uint32_t to, int bytes, uint32_t barrier, const std::function<void()> &copy) {
  block *home = current()->home;
  mbarrier *b = mbarrier_at(barrier);
  shared_pointer(to, (size_t)bytes);
  const auto arrive = [=] {
    copy();
    b->bytes -= bytes;
    settle(home, b);
  };
  if (late()) {
    home->arriving.push_back(arrive);
  } else {
    arrive();
  }
}

static void store(const bulk_copy &copy) {
  if (late()) {
    current()->stores.add(copy);
  } else {
    copy();
  }
}

void bulk_wait(int pending) {
  current()->stores.finish(pending, [](const bulk_copy &copy) { copy(); });
}

// The 128-byte swizzle: 16-byte pieces change places within 128 bytes, by the number of the 128 bytes.
static uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// Calls act(shared address, global pointer or NULL outside the tensor, bytes) for the pieces of a box.
template <class Act>
static void for_box(const CUtensorMap &map, const int (&at)[4], uint32_t shared, Act act) {
  const uint32_t piece = 16 / map.element_bytes, columns = map.box[0];
  uint32_t box[4] = {map.box[0], 1, 1, 1};
  for (uint32_t d = 1; d < map.rank; d++) box[d] = map.box[d];
  uint32_t address = shared;
  for (uint32_t z = 0; z < box[3]; z++) {
    for (uint32_t y = 0; y < box[2]; y++) {
      for (uint32_t x = 0; x < box[1]; x++) {
        const int64_t place[4] = {at[0], (int64_t)at[1] + x, (int64_t)at[2] + y, (int64_t)at[3] + z};
        bool inside = true;
        unsigned char *row = map.base;
        for (uint32_t d = 1; d < map.rank; d++) {
          inside = inside && place[d] >= 0 && place[d] < (int64_t)map.size[d];
          row += place[d] * (int64_t)map.stride[d];
        }
        for (uint32_t c = 0; c < columns; c += piece, address += 16) {
          const int64_t first = place[0] + c, left = (int64_t)map.size[0] - first;
          const int count = !inside || first < 0 || left <= 0 ? 0 : (int)(left < piece ? left : piece);
          act(map.swizzle_128 ? swizzled(address) : address, row + first * map.element_bytes,
              count * (int)map.element_bytes);
        }
      }
    }
  }
}

static int box_bytes(const CUtensorMap &map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t d = 0; d < map.rank; d++) bytes *= map.box[d];
  return (int)bytes;
}

static void check_box(const char *what, const CUtensorMap *map, uint32_t address) {
  if (map->rank < 1 || map->rank > 4 || !map->base) fail("%s of a tensor map that was not made", what);
  if (address % (map->swizzle_128 ? 1024 : 128))
    fail("%s at %#x of shared memory: not aligned to %d", what, address, map->swizzle_128 ? 1024 : 128);
}

void tma_load(uint32_t to, const CUtensorMap *map, const int at[4], uint32_t barrier) {
  check_box("tma_load", map, to);
  const CUtensorMap m = *map;
  const int place[4] = {at[0], at[1], at[2], at[3]};
  unsigned char *shared = shared_pointer(to, (size_t)box_bytes(m));
  load(to, box_bytes(m), barrier, [=] {
    for_box(m, place, to, [=](uint32_t address, const unsigned char *from, int bytes) {
      unsigned char *piece = shared + (address - to);
      if (bytes) memcpy(piece, from, (size_t)bytes);
      memset(piece + bytes, 0, (size_t)(16 - bytes));
    });
  });
}

void tma_store(const CUtensorMap *map, const int at[4], uint32_t from) {
  check_box("tma_store", map, from);
  const CUtensorMap m = *map;
  const int place[4] = {at[0], at[1], at[2], at[3]};
  const unsigned char *shared = shared_pointer(from, (size_t)box_bytes(m));
  store([=] {
    for_box(m, place, from, [=](uint32_t address, unsigned char *to, int bytes) {
      if (bytes) memcpy(to, shared + (address - from), (size_t)bytes);
    });
  });
}

static void check_bulk(const char *what, uint32_t shared, const void *global, int bytes) {
  if (shared % 16 || (uintptr_t)global % 16 || bytes % 16 || bytes <= 0)
    fail("%s of %d bytes, %#x of shared memory and %p: all are multiples of 16", what, bytes, shared, global);
}

void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier) {
  check_bulk("bulk_load", to, from, bytes);
  unsigned char *shared = shared_pointer(to, (size_t)bytes);
  load(to, bytes, barrier, [=] { memcpy(shared, from, (size_t)bytes); });
}

void bulk_store(void *to, uint32_t from, int bytes) {
  check_bulk("bulk_store", from, to, bytes);
  const unsigned char *shared = shared_pointer(from, (size_t)bytes);
  store([=] { memcpy(to, shared, (size_t)bytes); });
}

void bulk_add(float *to, uint32_t from, int bytes) {
  check_bulk("bulk_add", from, to, bytes);
  const float *shared = (const float *)shared_pointer(from, (size_t)bytes);
  store([=] {
    for (int i = 0; i < bytes / 4; i++) atomicAdd(to + i, shared[i]);
  });
}

// stmatrix

struct matrix_store {
  const uint32_t *r;
  unsigned char *row;
};

static void store_lanes(void *const operand[WARP], uint32_t mask) {
  if (mask != ~0u) fail("stmatrix without all lanes of the warp (%#x)", mask);
  for (int lane = 0; lane < WARP; lane++) {
    const uint32_t *r = ((matrix_store *)operand[lane])->r;
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; m++) {
      for (int c = 0; c < 2; c++) {
        const uint16_t half = (uint16_t)(r[m] >> 16 * c);
        memcpy(((matrix_store *)operand[8 * m + g])->row + 2 * (2 * t + c), &half, 2);
      }
    }
  }
}

void store_matrices(uint32_t to, const uint32_t *r) {
  if (to % 16) fail("stmatrix at %#x, which is not a multiple of 16", to);
  matrix_store mine = {r, shared_pointer(to, 16)};
  gather("store_matrices", ~0u, &mine, store_lanes);
}

// wgmma: products are done when all four warps wait for them (or commit them, when early), in order.

enum { WARPGROUP = 128 };

static float half_at(const unsigned char *p, bool f16) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return f16 ? from_f16(bits) : from_bf16(bits);
}

// x[k][i] of an operand in shared memory, i = 0 .. count - 1, k = 0 .. 15.
static void read_operand(uint32_t descriptor, bool mn_major, bool f16, int count, float *x, int stride) {
  const uint32_t base = (descriptor & 0x3fff) << 4, panel = (descriptor >> 16 & 0x3fff) << 4;
  if (mn_major) {
    for (int k = 0; k < 16; k++) {
      for (int i = 0; i < count; i += 8) {
        const uint32_t address = base + (uint32_t)(i / 64) * panel + (uint32_t)k * 128 + (uint32_t)(i % 64) * 2;
        const unsigned char *piece = shared_pointer(swizzled(address), 16);
        for (int c = 0; c < 8; c++) x[k * stride + i + c] = half_at(piece + 2 * c, f16);
      }
    }
  } else {
    for (int i = 0; i < count; i++) {
      for (int k = 0; k < 16; k += 8) {
        const unsigned char *piece = shared_pointer(swizzled(base + (uint32_t)i * 128 + (uint32_t)k * 2), 16);
        for (int c = 0; c < 8; c++) x[(k + c) * stride + i] = half_at(piece + 2 * c, f16);
      }
    }
  }
}

// One product of the warpgroup; each thread's part of it in parts[].
static void multiply(const product *const parts[WARPGROUP]) {
  const product &p = *parts[0];
  float a[16][64], b[16][256];
  if (p.a_in_registers) {
    for (int t = 0; t < WARPGROUP; t++) {
      const int row = t / WARP * 16 + t % WARP / 4, column = t % 4 * 2;
      for (int i = 0; i < 4; i++) {
        for (int c = 0; c < 2; c++) {
          const uint16_t bits = (uint16_t)(parts[t]->a_registers[i] >> 16 * c);
          a[i / 2 * 8 + column + c][row + i % 2 * 8] = p.half ? from_f16(bits) : from_bf16(bits);
        }
      }
    }
  } else {
    read_operand(p.a, p.a_transposed, p.half, 64, a[0], 64);
  }
  read_operand(p.b, p.b_transposed, p.half, p.columns, b[0], 256);
  for (int rows = 0; rows < 64; rows += 8) {
    double sum[8][256];
    const int warp = rows / 16, r = rows / 8 % 2;
    for (int lane = 0; lane < WARP; lane++) {
      const float *d = parts[warp * WARP + lane]->d;
      double *row = sum[lane / 4];
      for (int j = 0; j < p.columns / 8; j++) {
        for (int c = 0; c < 2; c++) row[8 * j + 2 * (lane % 4) + c] = p.accumulate ? d[4 * j + 2 * r + c] : 0;
      }
    }
    for (int i = 0; i < 8; i++) {
      for (int k = 0; k < 16; k++) {
        const double x = a[k][rows + i];
        for (int j = 0; j < p.columns; j++) sum[i][j] += x * b[k][j];
      }
    }
    for (int lane = 0; lane < WARP; lane++) {
      float *d = parts[warp * WARP + lane]->d;
      const double *row = sum[lane / 4];
      for (int j = 0; j < p.columns / 8; j++) {
        for (int c = 0; c < 2; c++) d[4 * j + 2 * r + c] = (float)row[8 * j + 2 * (lane % 4) + c];
      }
    }
  }
}

static bool alike(const product &a, const product &b) {
  return a.columns == b.columns && a.half == b.half && a.accumulate == b.accumulate &&
         a.a_in_registers == b.a_in_registers && a.a_transposed == b.a_transposed && a.b_transposed == b.b_transposed &&
         (a.a_in_registers || a.a == b.a) && a.b == b.b;
}

void wgmma(const product &p) {
  current()->products.add(p);
}

void wgmma_wait(int pending) {
  block *home = current()->home;
  const int group = current()->number / WARPGROUP;
  barrier *b = &home->warpgroups[group];
  if (b->arrived && b->expected != pending)
    fail("wgmma_wait<%d>, where others of the warpgroup are in wgmma_wait<%d>", pending, b->expected);
  b->expected = pending;
  if (++b->arrived < WARPGROUP) {
    wait(b, "wgmma_wait", (uint64_t)pending);
    return;
  }
  b->arrived = 0;
  thread *threads = home->threads + group * WARPGROUP;
  size_t done = 0;
  threads[0].products.finish(pending, [&](const product &mine) {
    const product *parts[WARPGROUP] = {&mine};
    for (int t = 1; t < WARPGROUP; t++) {
      const groups<product> &queue = threads[t].products;
      if (queue.first + done >= queue.items.size()) fail("thread %d of the warpgroup has issued fewer wgmma", t);
      parts[t] = &queue.items[queue.first + done].work;
      if (!alike(*parts[t], mine)) fail("thread %d of the warpgroup has another wgmma than its first thread", t);
    }
    multiply(parts);
    done++;
  });
  for (int t = 1; t < WARPGROUP; t++) {
    size_t finished = 0;
    threads[t].products.finish(pending, [&](const product &) { finished++; });
    if (finished != done)
      fail("thread %d of the warpgroup has issued more wgmma, or in other batches, than its first thread", t);
  }
  wake(home, b);
}

void wgmma_commit() {
  current()->products.commit();
  if (!late()) wgmma_wait(0);
}

}  // namespace emulator
