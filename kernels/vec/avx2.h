// SPDX-License-Identifier: Apache-2.0
//
// 8 lanes of fp32 in one AVX register. Only for files compiled with -mavx2 -mfma; fp16 needs -mf16c.

#ifndef MOSS_KERNELS_VEC_AVX2_H_
#define MOSS_KERNELS_VEC_AVX2_H_

#include <immintrin.h>

#include <cstdint>

namespace moss {
namespace {

struct Vec8 {
  static constexpr std::int64_t kLanes = 8;
  using Bits = __m256i;  // an integer of 32 bits in each lane
  __m256 v;

  static Vec8 set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  // All ones in the first `count` lanes.
  static __m256i first(std::int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // The first `count` lanes from memory, zeros in the others.
  static Vec8 load_some(const float* p, std::int64_t count) { return {_mm256_maskload_ps(p, first(count))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_some(float* p, std::int64_t count) const { _mm256_maskstore_ps(p, first(count), v); }

  static Bits set_bits(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static Bits load_bits(const std::uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_bits(Bits a, std::uint32_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static Bits product(Bits a, Bits b) { return _mm256_mullo_epi32(a, b); }
  static Bits sum(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
  static Bits difference(Bits a, Bits b) { return _mm256_sub_epi32(a, b); }
  static Bits larger(Bits a, Bits b) { return _mm256_max_epi32(a, b); }  // signed
  template <int kCount>
  static Bits right(Bits a) {
    return _mm256_srli_epi32(a, kCount);
  }
  static Vec8 of_bits(Bits a) { return {_mm256_castsi256_ps(a)}; }
  static Vec8 of_integers(Bits a) { return {_mm256_cvtepi32_ps(a)}; }
  Bits bits() const { return _mm256_castps_si256(v); }

  // int8; what is stored are integers in -127 .. 127.
  static Vec8 load_codes(const std::int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  void store_codes(std::int8_t* p) const {
    const __m256i codes = _mm256_cvtps_epi32(v);
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(pairs, pairs));
  }
#if defined(__F16C__)
  // fp16; what is stored are numbers that it has.
  static Vec8 load_half(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store_half(std::uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
};

inline Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec8 operator/(Vec8 a, Vec8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec8 operator-(Vec8 a) { return {_mm256_sub_ps(_mm256_setzero_ps(), a.v)}; }
inline Vec8 fma(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
inline Vec8 fms(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }    // a b - c
inline Vec8 fnma(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline Vec8 max(Vec8 a, Vec8 b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where one is NaN
inline Vec8 min(Vec8 a, Vec8 b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where one is NaN
inline Vec8 floor(Vec8 x) { return {_mm256_floor_ps(x.v)}; }
inline Vec8 abs(Vec8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec8 where_negative(Vec8 x, Vec8 a, Vec8 b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}

inline Vec8 round_exponent(Vec8 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// p 2^n for p in [2^-1/2, 2^1/2] and n an integer <= 127; 0 for n < -125. The power is added to the exponent bits.
inline Vec8 scale_by_power(Vec8 p, Vec8 n) {
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), power));
  return {_mm256_and_ps(scaled, _mm256_cmp_ps(n.v, _mm256_set1_ps(-125.5f), _CMP_NLT_UQ))};
}

inline float sum(Vec8 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// sums[i] += sum of the lanes of the i-th vector.
inline void add_sums(Vec8 a, Vec8 b, Vec8 c, Vec8 d, float* sums) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));  // a b c d a b c d
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), half));
}

}  // namespace
}  // namespace moss

#endif  // MOSS_KERNELS_VEC_AVX2_H_
