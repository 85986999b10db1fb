// SPDX-License-Identifier: Apache-2.0
//
// The linear layer of int8 inputs with AVX-512 VNNI: vpdpbusd multiplies 4 columns of a strip's 16 outputs, as unsigned
// codes + 8 or + 128, with 4 codes of the input. What the offset adds, a block's sum of the input takes away
// beforehand, as integers. Formula and shapes: linear.h; layout of the weights: layout.h.
//
// Up to 12 rows go through a strip together, their integers and their outputs in registers, so that weights are
// loaded and unpacked once for them. Each output goes through the same operations whatever the number of rows.

#include <immintrin.h>

#include <cstring>

#include "strips.h"

namespace moss {
namespace {

constexpr std::int64_t S = kX86Layout.strip;
constexpr std::int64_t kLineBytes = 64;  // 4 columns of a strip in 8 bits, two times 4 in 4 bits
// How far ahead weights are fetched into the second cache: the processor by itself stops at pages of 4 KiB.
constexpr std::int64_t kAheadBytes = 8192;

// 4 codes of a row, for every output of a strip.
inline __m512i columns_of(const std::int8_t* x) {
  std::int32_t codes;
  std::memcpy(&codes, x, sizeof(codes));
  return _mm512_set1_epi32(codes);
}

// bf16 as fp32.
inline __m512 widened(const std::uint8_t* scales) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Blocks whose sums of the input are multiplied by the offset at once: one multiplication less for a row and block.
constexpr std::int64_t kSumsTogether = 16;

inline void fetch(const std::uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1); }

template <WeightName weight>
struct Strip {
  static constexpr const LinearLayout& layout = kX86Layout;
  static constexpr WeightFormat format = weight_format(weight);
  static constexpr int kMostRows = 12;
  static constexpr int kMostStrips = 1;

  template <int R>
  static void run(const LinearArgs& args, std::int64_t m, std::int64_t n, std::int64_t count,
                  const std::uint8_t* strip) {
    const std::int64_t N = args.shape.outputs, blocks = block_count(format, args.shape.columns);
    const std::int64_t C = blocks * format.block;
    const std::uint8_t* codes = strip;
    const std::uint8_t* const scales = strip + strip_code_bytes(layout, format, args.shape.columns);
    const std::int8_t* x = args.x_codes + m * C;
    const float* const x_scales = args.x_scales + m * blocks;
    const std::int32_t* const x_sums = args.x_sums + m * blocks;
    alignas(kLineBytes) std::int32_t taken_away[R][kSumsTogether];
    const __m512i nibble = _mm512_set1_epi8(0xf);

    __m512 y[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) y[r] = _mm512_setzero_ps();
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t of_block = b % kSumsTogether;
      if (of_block == 0) {
        const std::int64_t count = blocks - b < kSumsTogether ? blocks - b : kSumsTogether;
        const auto some = static_cast<__mmask16>((1u << count) - 1);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const __m512i offset = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(some, x_sums + r * blocks + b),
                                                   format.bits - 1);
          _mm512_store_si512(taken_away[r], _mm512_sub_epi32(_mm512_setzero_si512(), offset));
        }
      }
      __m512i sums[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) sums[r] = _mm512_set1_epi32(taken_away[r][of_block]);
      for (std::int64_t k = 0; k < format.block; k += 32, x += 32) {
#pragma GCC unroll 8
        for (std::int64_t j = 0; j < format.bits; ++j, codes += kLineBytes) {
          fetch(codes + kAheadBytes);
          const __m512i line = _mm512_loadu_si512(codes);
          if constexpr (format.bits == 8) {
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], line, columns_of(x + r * C + 4 * j));
          } else {
            const __m512i low = _mm512_and_si512(line, nibble);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
              sums[r] = _mm512_dpbusd_epi32(sums[r], low, columns_of(x + r * C + 4 * j));
              sums[r] = _mm512_dpbusd_epi32(sums[r], high, columns_of(x + r * C + 4 * j + 16));
            }
          }
        }
      }
      if constexpr (format.row_scale) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), _mm512_set1_ps(x_scales[r * blocks + b]), y[r]);
        }
      } else {
        fetch(scales + b * S * 2 + kAheadBytes);
        const __m512 scale = widened(scales + b * S * 2);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r]), _mm512_set1_ps(x_scales[r * blocks + b]));
          y[r] = _mm512_fmadd_ps(sum, scale, y[r]);
        }
      }
    }
    const auto outputs = static_cast<__mmask16>((1u << count) - 1);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      if constexpr (format.row_scale) y[r] = _mm512_mul_ps(y[r], _mm512_loadu_ps(scales));
      if (args.bias) y[r] = _mm512_add_ps(y[r], _mm512_maskz_loadu_ps(outputs, args.bias + n));
      _mm512_mask_storeu_ps(args.y + (m + r) * N + n, outputs, y[r]);
    }
  }
};

}  // namespace

const LinearKernel moss_linear_f32_int8_block_int8_avx512vnni = {
    kAvx512Vnni, "moss_linear_f32_int8_block_int8_avx512vnni", &kX86Layout,
    run_strips<Strip<WeightName::int8>>};
const LinearKernel moss_linear_f32_int8_block_int8_g32_avx512vnni = {
    kAvx512Vnni, "moss_linear_f32_int8_block_int8_g32_avx512vnni", &kX86Layout,
    run_strips<Strip<WeightName::int8_g32>>};
const LinearKernel moss_linear_f32_int8_block_int4_g32_avx512vnni = {
    kAvx512Vnni, "moss_linear_f32_int8_block_int4_g32_avx512vnni", &kX86Layout,
    run_strips<Strip<WeightName::int4_g32>>};
const LinearKernel moss_linear_f32_int8_block_int4_g128_avx512vnni = {
    kAvx512Vnni, "moss_linear_f32_int8_block_int4_g128_avx512vnni", &kX86Layout,
    run_strips<Strip<WeightName::int4_g128>>};

}  // namespace moss
