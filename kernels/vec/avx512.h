// SPDX-License-Identifier: Apache-2.0
//
// 16 lanes of fp32 in one AVX-512F register. Only for files compiled with -mavx512f.

#ifndef MOSS_KERNELS_VEC_AVX512_H_
#define MOSS_KERNELS_VEC_AVX512_H_

#include <immintrin.h>

#include <cstdint>

namespace moss {
namespace {

struct Vec16 {
  static constexpr std::int64_t kLanes = 16;
  using Bits = __m512i;  // an integer of 32 bits in each lane
  __m512 v;

  static Vec16 set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // The first `count` lanes from memory, zeros in the others.
  static Vec16 load_some(const float* p, std::int64_t count) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_some(float* p, std::int64_t count) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
  }

  static Bits set_bits(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Bits load_bits(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_bits(Bits a, std::uint32_t* p) { _mm512_storeu_si512(p, a); }
  static Bits product(Bits a, Bits b) { return _mm512_mullo_epi32(a, b); }
  static Bits sum(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
  static Bits difference(Bits a, Bits b) { return _mm512_sub_epi32(a, b); }
  static Bits larger(Bits a, Bits b) { return _mm512_max_epi32(a, b); }  // signed
  template <int kCount>
  static Bits right(Bits a) {
    return _mm512_srli_epi32(a, kCount);
  }
  static Vec16 of_bits(Bits a) { return {_mm512_castsi512_ps(a)}; }
  static Vec16 of_integers(Bits a) { return {_mm512_cvtepi32_ps(a)}; }
  Bits bits() const { return _mm512_castps_si512(v); }

  // int8; what is stored are integers in -127 .. 127.
  static Vec16 load_codes(const std::int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store_codes(std::int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  // fp16; what is stored are numbers that it has.
  static Vec16 load_half(const std::uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store_half(std::uint16_t* p) const {
    const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
};

inline Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec16 operator/(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec16 operator-(Vec16 a) { return {_mm512_sub_ps(_mm512_setzero_ps(), a.v)}; }
inline Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
inline Vec16 fms(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a b - c
inline Vec16 fnma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where one is NaN
inline Vec16 min(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where one is NaN
inline Vec16 floor(Vec16 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline Vec16 abs(Vec16 a) { return {_mm512_abs_ps(a.v)}; }
inline Vec16 where_negative(Vec16 x, Vec16 a, Vec16 b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v)};
}

inline Vec16 round_exponent(Vec16 x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec16 scale_by_power(Vec16 p, Vec16 n) { return {_mm512_scalef_ps(p.v, n.v)}; }  // p 2^n

inline float sum(Vec16 a) { return _mm512_reduce_add_ps(a.v); }

// sums[i] += sum of the lanes of the i-th vector.
inline void add_sums(Vec16 a, Vec16 b, Vec16 c, Vec16 d, float* sums) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));  // a b a b a b ...
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
  const __m512 abcd =  // a b c d a b c d ...
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1)));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), quarter));
}

}  // namespace
}  // namespace moss

#endif  // MOSS_KERNELS_VEC_AVX512_H_
