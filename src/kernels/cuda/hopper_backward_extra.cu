// backward attention on Hopper with one of ALiBi, bias, dropout and softcap, for widths up to 128
//
// Its kernels may spill a dozen words more than without extras: where the slope's gradient is summed; the bias of a
// step, which is in registers before its scores; what a softcap lets through, kept beside the weights. With dropout
// fifty words a step: the weights are there twice, with dropout for dV and without for dS.
#include "kernels/cuda/hopper_backward.cuh"

template int hopper_backward_launch<__nv_bfloat16, 128, false, HOPPER_BACKWARD_ALIBI>(const hopper_backward_call &,
                                                                                      unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, false, HOPPER_BACKWARD_ALIBI>(const hopper_backward_call &, unsigned,
                                                                               cudaStream_t);
template int hopper_backward_launch<__nv_bfloat16, 128, false, HOPPER_BACKWARD_BIAS>(const hopper_backward_call &,
                                                                                     unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, false, HOPPER_BACKWARD_BIAS>(const hopper_backward_call &, unsigned,
                                                                              cudaStream_t);
template int hopper_backward_launch<__nv_bfloat16, 128, false, HOPPER_BACKWARD_DROPOUT>(const hopper_backward_call &,
                                                                                        unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, false, HOPPER_BACKWARD_DROPOUT>(const hopper_backward_call &, unsigned,
                                                                                 cudaStream_t);
template int hopper_backward_launch<__nv_bfloat16, 128, false, HOPPER_BACKWARD_SOFTCAP>(const hopper_backward_call &,
                                                                                        unsigned, cudaStream_t);
template int hopper_backward_launch<__half, 128, false, HOPPER_BACKWARD_SOFTCAP>(const hopper_backward_call &, unsigned,
                                                                                 cudaStream_t);
