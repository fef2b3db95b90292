// backward attention on Hopper with dropout, for widths up to 128
//
// Its kernels may spill fifty words a step: the weights are there twice, with dropout for dV and without for dS.
#include "kernels/cuda/hopper_backward.cuh"

template int hopper_backward_launch<__nv_bfloat16, 128, false, HOPPER_BACKWARD_DROPOUT>(const hopper_backward_call &,
                                                                                        unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, false, HOPPER_BACKWARD_DROPOUT>(const hopper_backward_call &, unsigned,
                                                                                 cudaStream_t);
