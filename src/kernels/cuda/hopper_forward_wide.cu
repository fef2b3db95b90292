// the forward kernels of Hopper for wider rows, up to 256
#include "kernels/cuda/hopper_forward.cuh"

template int hopper_forward_launch<forward_shape<__nv_bfloat16, 192, 128>>(const char *, const forward_call &, int,
                                                                           cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 192, 128>>(const char *, const forward_call &, int,
                                                                    cudaStream_t);
template int hopper_forward_launch<forward_shape<__nv_bfloat16, 192, 192>>(const char *, const forward_call &, int,
                                                                           cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 192, 192>>(const char *, const forward_call &, int,
                                                                    cudaStream_t);
template int hopper_forward_launch<forward_shape<__nv_bfloat16, 256, 256>>(const char *, const forward_call &, int,
                                                                           cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 256, 256>>(const char *, const forward_call &, int,
                                                                    cudaStream_t);
