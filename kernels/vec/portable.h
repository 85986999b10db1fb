// SPDX-License-Identifier: Apache-2.0
//
// 4 lanes of fp32 in the vector extension that GCC and Clang share: NEON on 64-bit ARM, SSE2 on x86-64, whatever the
// compiler makes of it elsewhere. Needs no flag. Products and sums are fused where the baseline has the instruction.

#ifndef MOSS_KERNELS_VEC_PORTABLE_H_
#define MOSS_KERNELS_VEC_PORTABLE_H_

#include <cstdint>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace moss {
namespace {

struct Vec4 {
  static constexpr std::int64_t kLanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef std::int32_t Ints __attribute__((vector_size(16)));
  typedef std::uint32_t Bits __attribute__((vector_size(16)));  // an integer of 32 bits in each lane
  typedef std::int8_t Codes __attribute__((vector_size(4)));
  typedef std::uint16_t Halves __attribute__((vector_size(8)));
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

  static Bits set_bits(std::uint32_t x) { return Bits{x, x, x, x}; }
  static Bits load_bits(const std::uint32_t* p) {
    Bits a;
    __builtin_memcpy(&a, p, sizeof(a));
    return a;
  }
  static void store_bits(Bits a, std::uint32_t* p) { __builtin_memcpy(p, &a, sizeof(a)); }
  static Bits product(Bits a, Bits b) { return a * b; }
  static Bits sum(Bits a, Bits b) { return a + b; }
  static Bits difference(Bits a, Bits b) { return a - b; }
  static Bits larger(Bits a, Bits b) {  // signed
    return where(reinterpret_cast<Ints>(a) > reinterpret_cast<Ints>(b), of_bits(a), of_bits(b)).bits();
  }
  template <int kCount>
  static Bits right(Bits a) {
    return a >> kCount;
  }
  static Vec4 of_bits(Bits a) { return {reinterpret_cast<Floats>(a)}; }
  static Vec4 of_integers(Bits a) { return {__builtin_convertvector(reinterpret_cast<Ints>(a), Floats)}; }
  Bits bits() const { return reinterpret_cast<Bits>(v); }

  // int8; what is stored are integers in -127 .. 127.
  static Vec4 load_codes(const std::int8_t* p) {
    Codes codes;
    __builtin_memcpy(&codes, p, sizeof(codes));
    return {__builtin_convertvector(codes, Floats)};
  }
  void store_codes(std::int8_t* p) const {
    const Codes codes = __builtin_convertvector(__builtin_convertvector(v, Ints), Codes);
    __builtin_memcpy(p, &codes, sizeof(codes));
  }
  // fp16; what is stored are numbers that it has.
  static Vec4 load_half(const std::uint16_t* p) {
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof(halves));
    const Bits own = __builtin_convertvector(halves, Bits), magnitude = own & 0x7fff;
    const Vec4 small = {of_integers(magnitude).v * set(0x1p-24f).v};
    const Bits bias = set_bits(112u << 23) & reinterpret_cast<Bits>(magnitude >= 0x7c00);  // NaN
    const Vec4 large = of_bits((magnitude << 13) + (112u << 23) + bias);
    return of_bits(where(reinterpret_cast<Ints>(magnitude < 0x400), small, large).bits() | (own & 0x8000) << 16);
  }
  void store_half(std::uint16_t* p) const {
    const Bits magnitude = bits() & 0x7fffffffu;
    const Ints small = __builtin_convertvector(of_bits(magnitude & 0x3fffffffu).v * set(0x1p24f).v, Ints);
    const Bits large = (magnitude - (112u << 23)) >> 13;
    Bits half = where(reinterpret_cast<Ints>(magnitude < (113u << 23)), of_bits(reinterpret_cast<Bits>(small)),
                      of_bits(large)).bits();
    half = where(reinterpret_cast<Ints>(magnitude > 0x7f800000u), of_bits(set_bits(0x7e00)), of_bits(half)).bits();
    const Halves halves = __builtin_convertvector(half | (bits() & 0x80000000u) >> 16, Halves);
    __builtin_memcpy(p, &halves, sizeof(halves));
  }
};

inline Vec4 operator+(Vec4 a, Vec4 b) { return {a.v + b.v}; }
inline Vec4 operator*(Vec4 a, Vec4 b) { return {a.v * b.v}; }
inline Vec4 operator/(Vec4 a, Vec4 b) { return {a.v / b.v}; }
inline Vec4 operator-(Vec4 a) { return {-a.v}; }
#if defined(__aarch64__)
// Said, and not left to the compiler, which some files forbid to fuse what is not meant to be.
inline Vec4 fma(Vec4 a, Vec4 b, Vec4 c) { return {reinterpret_cast<Vec4::Floats>(vfmaq_f32(c.v, a.v, b.v))}; }
inline Vec4 fms(Vec4 a, Vec4 b, Vec4 c) { return fma(a, b, -c); }
inline Vec4 fnma(Vec4 a, Vec4 b, Vec4 c) { return {reinterpret_cast<Vec4::Floats>(vfmsq_f32(c.v, a.v, b.v))}; }
#else
inline Vec4 fma(Vec4 a, Vec4 b, Vec4 c) { return {a.v * b.v + c.v}; }
inline Vec4 fms(Vec4 a, Vec4 b, Vec4 c) { return {a.v * b.v - c.v}; }
inline Vec4 fnma(Vec4 a, Vec4 b, Vec4 c) { return {c.v - a.v * b.v}; }
#endif
inline Vec4 max(Vec4 a, Vec4 b) { return Vec4::where(a.v > b.v, a, b); }  // b where one is NaN
inline Vec4 min(Vec4 a, Vec4 b) { return Vec4::where(a.v < b.v, a, b); }  // b where one is NaN
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

// For |x| < 2^22.
inline Vec4 floor(Vec4 x) {
  const Vec4 shift = Vec4::set(12582912.0f);
  const Vec4 nearest = {(x.v + shift.v) - shift.v};
  return {nearest.v - Vec4::where(nearest.v > x.v, Vec4::set(1.0f), Vec4::set(0.0f)).v};
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
