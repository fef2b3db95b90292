// backward attention on Hopper with bias, softcap, ALiBi and dropout together, for widths up to 128
//
// Its kernels may spill thirty words a step: the weights are there twice, with dropout for dV and without for dS.
#include "kernels/cuda/hopper_backward.cuh"

template int hopper_backward_launch<__nv_bfloat16, 128, false, HOPPER_BACKWARD_ANY>(const hopper_backward_call &,
                                                                                    unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, false, HOPPER_BACKWARD_ANY>(const hopper_backward_call &, unsigned,
                                                                             cudaStream_t);
template int hopper_backward_launch<__nv_bfloat16, 128, true, HOPPER_BACKWARD_ANY>(const hopper_backward_call &,
                                                                                   unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, true, HOPPER_BACKWARD_ANY>(const hopper_backward_call &, unsigned,
                                                                            cudaStream_t);
