// the backward kernels of Hopper for widths up to 192
#include "kernels/cuda/hopper_backward_wide.cuh"

template int hopper_wide_launch<hopper_wide_shape<__nv_bfloat16, 192, 128>>(const char *, const hopper_backward_call &,
                                                                            int, cudaStream_t);
template int hopper_wide_launch<hopper_wide_shape<__half, 192, 128>>(const char *, const hopper_backward_call &, int,
                                                                     cudaStream_t);
template int hopper_wide_launch<hopper_wide_shape<__nv_bfloat16, 192, 192>>(const char *, const hopper_backward_call &,
                                                                            int, cudaStream_t);
template int hopper_wide_launch<hopper_wide_shape<__half, 192, 192>>(const char *, const hopper_backward_call &, int,
                                                                     cudaStream_t);
