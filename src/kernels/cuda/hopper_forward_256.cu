// the forward kernels of Hopper for widths up to 256
//
// They may spill: two registers, read back once at the end of an item, where O takes 128 of 232.
#include "kernels/cuda/hopper_forward.cuh"

template int hopper_forward_launch<forward_shape<__nv_bfloat16, 256, 256>>(const char *, const forward_call &, int,
                                                                           cudaStream_t);
template int hopper_forward_launch<forward_shape<__half, 256, 256>>(const char *, const forward_call &, int,
                                                                    cudaStream_t);
