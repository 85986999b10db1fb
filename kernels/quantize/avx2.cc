// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx2.h"
#include "vector.h"

namespace moss {
namespace {

struct Avx2 {
  using Vec = Vec8;
  using Ints = __m256i;

  // Without a sign, numbers are in the order of their bits, NaN above all.
  static Vec larger(Vec a, Vec b) {
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
  }
  static float largest_lane(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(1, 0, 3, 2)));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtss_f32(_mm_castsi128_ps(most));
  }
  static Ints zeros() { return _mm256_setzero_si256(); }
  static Ints nearest(Vec x) { return _mm256_cvtps_epi32(round_exponent(x).v); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static std::int32_t sum(Ints a) {
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, _MM_SHUFFLE(2, 3, 0, 1))));
  }
  static void store(Ints a, std::int8_t* codes, std::int64_t count) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const std::int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    if (count == Vec::kLanes) {
      std::memcpy(codes, &bytes, Vec::kLanes);
    } else {
      std::memcpy(codes, &bytes, static_cast<std::size_t>(count));
    }
  }
};

}  // namespace

const QuantizeKernel moss_quantize_int8_block_f32_avx2 = {
    kAvx2, "moss_quantize_int8_block_f32_avx2", quantize<Avx2>};

}  // namespace moss
