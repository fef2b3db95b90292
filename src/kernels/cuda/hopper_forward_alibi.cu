// the forward kernels of Hopper with ALiBi
#include "kernels/cuda/hopper_forward.cuh"

template int hopper_forward_launch<forward_shape<__nv_bfloat16, 64, 64, FORWARD_ALIBI>>(const char *,
                                                                                        const forward_call &, int,
                                                                                        cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 64, 64, FORWARD_ALIBI>>(const char *, const forward_call &,
                                                                                 int, cudaStream_t);
template int hopper_forward_launch<forward_shape<__nv_bfloat16, 128, 128, FORWARD_ALIBI>>(const char *,
                                                                                          const forward_call &, int,
                                                                                          cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 128, 128, FORWARD_ALIBI>>(const char *, const forward_call &,
                                                                                   int, cudaStream_t);
