// how a function is declared that host and devices share
#ifndef SAFEATTN_EVERYWHERE_H
#define SAFEATTN_EVERYWHERE_H

#ifdef __CUDACC__
#define SA_EVERYWHERE static __host__ __device__ inline
#else
#define SA_EVERYWHERE static inline
#endif

#endif
