// the vector types of CUDA
#ifndef EMULATOR_VECTOR_TYPES_H
#define EMULATOR_VECTOR_TYPES_H

// clang-format off
#define EMULATOR_VECTORS(type, name, align2, align4)                                                       \
  struct name##1 { type x; };                                                                              \
  struct alignas(align2) name##2 { type x, y; };                                                           \
  struct name##3 { type x, y, z; };                                                                        \
  struct alignas(align4) name##4 { type x, y, z, w; };                                                     \
  static inline name##1 make_##name##1(type x) { return {x}; }                                             \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                  \
  static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                       \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
// clang-format on

EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(long, long, 16, 16)
EMULATOR_VECTORS(unsigned long, ulong, 16, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#endif
