// backward attention on Hopper with ALiBi, for widths up to 128
//
// Its kernels may spill a dozen words more than without extras, where the slope's gradient is summed.
#include "kernels/cuda/hopper_backward.cuh"

template int hopper_backward_launch<__nv_bfloat16, 128, false, HOPPER_BACKWARD_ALIBI>(const hopper_backward_call &,
                                                                                      unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, false, HOPPER_BACKWARD_ALIBI>(const hopper_backward_call &, unsigned,
                                                                               cudaStream_t);
