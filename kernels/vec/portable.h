// SPDX-License-Identifier: Apache-2.0
//
// 4 lanes of fp32 in the vector extension that GCC and Clang share: NEON on 64-bit ARM, SSE2 on x86-64, whatever the
// compiler makes of it elsewhere. Needs no flag. Products and sums are fused where the baseline has the instruction.

#ifndef MOSS_KERNELS_VEC_PORTABLE_H_
#define MOSS_KERNELS_VEC_PORTABLE_H_

#include <cstdint>

namespace moss {
namespace {

struct Vec4 {
  static constexpr std::int64_t kLanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef std::int32_t Ints __attribute__((vector_size(16)));
  Floats v;

  static Vec4 set(float x) { return {Floats{x, x, x, x}}; }
  static Vec4 load(const float* p) {
    Vec4 a;
    __builtin_memcpy(&a.v, p, sizeof(a.v));
    return a;
  }
  // The first `count` lanes from memory, zeros in the others.
  static Vec4 load_some(const float* p, std::int64_t count) {
    Vec4 a = set(0.0f);
    for (std::int64_t i = 0; i < count; ++i) a.v[i] = p[i];
    return a;
  }
  void store(float* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  void store_some(float* p, std::int64_t count) const {
    for (std::int64_t i = 0; i < count; ++i) p[i] = v[i];
  }
  // a in the lanes whose mask is all ones, b in the others.
  static Vec4 where(Ints mask, Vec4 a, Vec4 b) {
    return {reinterpret_cast<Floats>((mask & reinterpret_cast<Ints>(a.v)) | (~mask & reinterpret_cast<Ints>(b.v)))};
  }
};

inline Vec4 operator+(Vec4 a, Vec4 b) { return {a.v + b.v}; }
inline Vec4 operator*(Vec4 a, Vec4 b) { return {a.v * b.v}; }
inline Vec4 operator/(Vec4 a, Vec4 b) { return {a.v / b.v}; }
inline Vec4 operator-(Vec4 a) { return {-a.v}; }
inline Vec4 fma(Vec4 a, Vec4 b, Vec4 c) { return {a.v * b.v + c.v}; }
inline Vec4 fms(Vec4 a, Vec4 b, Vec4 c) { return {a.v * b.v - c.v}; }
inline Vec4 fnma(Vec4 a, Vec4 b, Vec4 c) { return {c.v - a.v * b.v}; }
inline Vec4 max(Vec4 a, Vec4 b) { return Vec4::where(a.v > b.v, a, b); }
inline Vec4 abs(Vec4 a) {
  return {reinterpret_cast<Vec4::Floats>(reinterpret_cast<Vec4::Ints>(a.v) & 0x7fffffff)};
}
inline Vec4 where_negative(Vec4 x, Vec4 a, Vec4 b) { return Vec4::where(x.v < Vec4::set(0.0f).v, a, b); }

// Below -150, where 2^x is 0 anyway, -150: the rounding by addition is right up to 2^22 only.
inline Vec4 round_exponent(Vec4 x) {
  const Vec4 shift = Vec4::set(12582912.0f), least = Vec4::set(-150.0f);  // 1.5 * 2^23
  const Vec4 bounded = Vec4::where(x.v < least.v, least, x);
  return {(bounded.v + shift.v) - shift.v};
}

// p 2^n for p in [2^-1/2, 2^1/2] and n an integer <= 127; 0 for n < -125. The power is added to the exponent bits.
inline Vec4 scale_by_power(Vec4 p, Vec4 n) {
  const Vec4::Ints scaled = reinterpret_cast<Vec4::Ints>(p.v) + (__builtin_convertvector(n.v, Vec4::Ints) << 23);
  return Vec4::where(n.v < Vec4::set(-125.5f).v, Vec4::set(0.0f), {reinterpret_cast<Vec4::Floats>(scaled)});
}

inline float sum(Vec4 a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

// sums[i] += sum of the lanes of the i-th vector.
inline void add_sums(Vec4 a, Vec4 b, Vec4 c, Vec4 d, float* sums) {
  sums[0] += sum(a);
  sums[1] += sum(b);
  sums[2] += sum(c);
  sums[3] += sum(d);
}

}  // namespace
}  // namespace moss

#endif  // MOSS_KERNELS_VEC_PORTABLE_H_
