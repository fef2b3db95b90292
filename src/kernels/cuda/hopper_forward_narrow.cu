// the forward kernels of Hopper for widths up to 128 without extras
#include "kernels/cuda/hopper_forward.cuh"

template int hopper_forward_launch<forward_shape<__nv_bfloat16, 64, 64>>(const char *, const forward_call &, int,
                                                                         cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 64, 64>>(const char *, const forward_call &, int,
                                                                  cudaStream_t);
template int hopper_forward_launch<forward_shape<__nv_bfloat16, 96, 96>>(const char *, const forward_call &, int,
                                                                         cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 96, 96>>(const char *, const forward_call &, int,
                                                                  cudaStream_t);
template int hopper_forward_launch<forward_shape<__nv_bfloat16, 128, 128>>(const char *, const forward_call &, int,
                                                                           cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 128, 128>>(const char *, const forward_call &, int,
                                                                    cudaStream_t);
