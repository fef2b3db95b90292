// mbarriers, TMA, bulk copies and wgmma: what ptx_hopper.cuh of the emulator is made of
#ifndef EMULATOR_HOPPER_H
#define EMULATOR_HOPPER_H
#include "block.h"
#include "cuda.h"

namespace emulator {

void mbarrier_init(uint32_t barrier, int count);
void mbarrier_arrive(uint32_t barrier, int bytes);  // `bytes` more are expected in this phase
void mbarrier_wait(uint32_t barrier, uint32_t parity);

void named_barrier(int id, int threads, bool waits);

// `at`: the first element's coordinates, innermost first.
void tma_load(uint32_t to, const CUtensorMap *map, const int at[4], uint32_t barrier);
void tma_store(const CUtensorMap *map, const int at[4], uint32_t from);
void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier);
void bulk_store(void *to, uint32_t from, int bytes);
void bulk_add(float *to, uint32_t from, int bytes);
void bulk_wait(int pending);

void store_matrices(uint32_t to, const uint32_t *r);

void wgmma(const product &p);
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace emulator

#endif
