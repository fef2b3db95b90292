// the backward kernels of Hopper for widths up to 256
#include "kernels/cuda/hopper_backward_wide.cuh"

template int hopper_wide_launch<hopper_wide_shape<__nv_bfloat16, 256, 256>>(const char *, const hopper_backward_call &,
                                                                            int, cudaStream_t);
template int hopper_wide_launch<hopper_wide_shape<__half, 256, 256>>(const char *, const hopper_backward_call &, int,
                                                                     cudaStream_t);
