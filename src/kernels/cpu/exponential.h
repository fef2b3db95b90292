// the numbers of 2^x and tanh, for one REAL; part of flash.h's vectors
//
// 2^f on [0, 1) for float: 1 + f q(f), q fitted for the least relative error with the constant held at exactly 1, so
// that the weight of a row's peak is 1; 8.3e-8. On [-1/2, 1/2] for double: the series, ln(2)^k / k!, 2e-16. On
// [0, 1/16]: (2^f - 1) / f interpolated at Chebyshev's points; 3e-17.
// tanh near 0: x + x^3 s(x^2), interpolated at Chebyshev's points; 1e-10 (float), 6e-18 (double) for |x| < 0.4.
#ifndef SAFEATTN_KERNELS_CPU_EXPONENTIAL_H
#define SAFEATTN_KERNELS_CPU_EXPONENTIAL_H

#define EXP2_TERMS_f32 1.867132323e-3f, 9.017024952e-3f, 5.579991762e-2f, 2.401644486e-1f, 6.931513120e-1f, 1.0f
#define EXP2_TERMS_f64                                                                                                 \
  2.5678435993488206e-11, 4.4455382718708117e-10, 7.0549116208011233e-9, 1.0178086009239700e-7, 1.3215486790144309e-6, \
      1.5252733804059841e-5, 1.5403530393381609e-4, 1.3333558146428443e-3, 9.6181291076284772e-3,                      \
      5.5504108664821580e-2, 2.4022650695910071e-1, 6.9314718055994531e-1, 1.0

#define EXP2_SIXTEENTH_TERMS                                                                                    \
  0.00015692444190046448, 0.0013331520045529266, 0.009618135722740813, 0.0555041085678426, 0.24022650695962044, \
      0.6931471805599448

#define TANH_TERMS_f32 -0.00756554334f, 0.0216937729f, -0.0539583625f, 0.133333137f, -0.333333333f
#define TANH_TERMS_f64                                                                               \
  -0.000179836703329575918, 0.00057321170737285955, -0.00145318795543843248, 0.00359188244205812849, \
      -0.00886322206131026137, 0.0218694881197627781, -0.0539682539617898768, 0.133333333333294627,  \
      -0.333333333333333295

#endif
