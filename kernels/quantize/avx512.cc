// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx512.h"
#include "vector.h"

namespace moss {
namespace {

struct Avx512 {
  using Vec = Vec16;
  using Ints = __m512i;

  // Without a sign, numbers are in the order of their bits, NaN above all.
  static Vec larger(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
  }
  static float largest_lane(Vec a) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(a.v)))));
  }
  static Ints zeros() { return _mm512_setzero_si512(); }
  static Ints nearest(Vec x) {
    return _mm512_cvt_roundps_epi32(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static std::int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a); }
  static void store(Ints a, std::int8_t* codes, std::int64_t count) {
    _mm512_mask_cvtepi32_storeu_epi8(codes, static_cast<__mmask16>((1u << count) - 1), a);
  }
};

}  // namespace

const QuantizeKernel moss_quantize_int8_block_f32_avx512 = {
    kAvx512, "moss_quantize_int8_block_f32_avx512", quantize<Avx512>};

}  // namespace moss
