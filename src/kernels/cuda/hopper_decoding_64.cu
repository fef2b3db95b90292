// few queries against many keys on Hopper, widths up to 64
#include "kernels/cuda/hopper_decoding.cuh"

template int hopper_decoding_launch<decoding_shape<products_bf16, 64>>(const char *, const decoding_job &, int,
                                                                       cudaStream_t);
template int hopper_decoding_launch<decoding_shape<products_f16, 64>>(const char *, const decoding_job &, int,
                                                                      cudaStream_t);
