// SPDX-License-Identifier: Apache-2.0
//
// The linear layer of int8 inputs with AVX2: vpmaddubsw multiplies 4 columns of 8 outputs, half a strip, with 4 codes
// of the input, and adds up pairs in 16 bits. Formula and shapes: linear.h; layout of the weights: layout.h.
//
// 4 bits: the weights are code + 8. An element of 16 bits takes 16 of 32 columns, at most 16 * 15 * 127 = 30480. What
// the 8 adds, a block's sum of the input takes away.
//
// 8 bits: pairs of code + 128 would overflow 16 bits, so codes are made signed again: |w| times x with the sign of w,
// at most 2 * 127 * 127 = 32258 a pair, widened at once.
//
// Each output goes through the same operations whatever the number of rows.
//
// One row meets 4 strips at a time while the next 4 are fetched, so that weights come from several places: that reads
// them 1.1 to 1.55 times as fast as one strip after the other (Zen 3, weights beyond the last cache).

#include "../vec/avx2.h"

#include <cstring>

#include "strips.h"

namespace moss {
namespace {

constexpr std::int64_t S = kX86Layout.strip;
constexpr std::int64_t kLineBytes = 64;  // 4 columns of a strip in 8 bits, two times 4 in 4 bits
constexpr std::int64_t kAheadBytes = 8192;  // how far ahead weights of several rows are fetched, into the second cache

// 4 codes of a row, for each of 8 outputs.
inline __m256i columns_of(const std::int8_t* x) {
  std::int32_t codes;
  std::memcpy(&codes, x, sizeof(codes));
  return _mm256_set1_epi32(codes);
}

inline __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// 8 scales in bf16.
inline __m256 widened(const std::uint8_t* scales) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void fetch(const std::uint8_t* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1); }

template <WeightName weight>
struct Strip {
  static constexpr const LinearLayout& layout = kX86Layout;
  static constexpr WeightFormat format = weight_format(weight);
  static constexpr int kMostRows = 4;
  static constexpr int kMostStrips = 4;

  // Adds to sums what 32 columns give: R rows, both halves of T strips that are `bytes` apart.
  template <int R, int T>
  static void add_columns(const std::uint8_t* codes, std::int64_t bytes, const std::int8_t* x, std::int64_t C,
                          __m256i (*sums)[R][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const std::int64_t ahead = R == 1 ? T * bytes : kAheadBytes;
    if constexpr (format.bits == 8) {
      const __m256i offset = _mm256_set1_epi8(-128);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j, codes += kLineBytes) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) fetch(codes + t * bytes + ahead);
        const __m256i first = columns_of(x + 4 * j), size_of_first = _mm256_abs_epi8(first);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i w = _mm256_xor_si256(load(codes + t * bytes + 32 * h), offset), size = _mm256_abs_epi8(w);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              // |w| serves all rows, |x| all outputs of the one.
              const __m256i pairs =
                  R == 1 ? _mm256_maddubs_epi16(size_of_first, _mm256_sign_epi8(w, first))
                         : _mm256_maddubs_epi16(size, _mm256_sign_epi8(columns_of(x + r * C + 4 * j), w));
              sums[t][r][h] = _mm256_add_epi32(sums[t][r][h], _mm256_madd_epi16(pairs, ones));
            }
          }
        }
      }
    } else {
      const __m256i nibble = _mm256_set1_epi8(0xf);
      __m256i pairs[T][R][2];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, codes += kLineBytes) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) fetch(codes + t * bytes + ahead);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i line = load(codes + t * bytes + 32 * h);
            const __m256i low = _mm256_and_si256(line, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(line, 4), nibble);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              __m256i& own = pairs[t][r][h];
              const __m256i of_low = _mm256_maddubs_epi16(low, columns_of(x + r * C + 4 * j));
              const __m256i of_high = _mm256_maddubs_epi16(high, columns_of(x + r * C + 4 * j + 16));
              own = _mm256_add_epi16(j ? _mm256_add_epi16(own, of_low) : of_low, of_high);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            sums[t][r][h] = _mm256_add_epi32(sums[t][r][h], _mm256_madd_epi16(pairs[t][r][h], ones));
          }
        }
      }
    }
  }

  // Rows m .. m + R - 1 of T strips.
  template <int R, int T = 1>
  static void run(const LinearArgs& args, std::int64_t m, std::int64_t n, std::int64_t count,
                  const std::uint8_t* strip) {
    const std::int64_t N = args.shape.outputs, blocks = block_count(format, args.shape.columns);
    const std::int64_t C = blocks * format.block, bytes = strip_bytes(layout, format, args.shape.columns);
    const std::uint8_t* codes = strip;
    const std::uint8_t* const scales = strip + strip_code_bytes(layout, format, args.shape.columns);
    const std::int8_t* x = args.x_codes + m * C;
    const float* const x_scales = args.x_scales + m * blocks;
    const std::int32_t* const x_sums = args.x_sums + m * blocks;
    // As pairs of words, minus the offset and 0; a sum, at most 127 * 128, is its own lower word.
    const __m256i offset = _mm256_set1_epi32(0xfff8);

    __m256 y[T][R][2];
    for (auto& of_strip : y) {
      for (auto& row : of_strip) {
        for (__m256& half : row) half = _mm256_setzero_ps();
      }
    }
    for (std::int64_t b = 0; b < blocks; ++b) {
      __m256i sums[T][R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256i none = format.bits == 8 ? _mm256_setzero_si256()
                                              : _mm256_madd_epi16(offset, _mm256_set1_epi32(x_sums[r * blocks + b]));
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) sums[t][r][h] = none;
        }
      }
      for (std::int64_t k = 0; k < format.block; k += 32, x += 32, codes += format.bits * kLineBytes) {
        add_columns<R, T>(codes, bytes, x, C, sums);
      }
      if constexpr (!format.row_scale && R > 1) fetch(scales + b * S * 2 + kAheadBytes);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          __m256 scale;
          if constexpr (!format.row_scale) scale = widened(scales + t * bytes + (b * S + 8 * h) * 2);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const __m256 sum = _mm256_cvtepi32_ps(sums[t][r][h]), x_scale = _mm256_set1_ps(x_scales[r * blocks + b]);
            y[t][r][h] = format.row_scale ? _mm256_fmadd_ps(sum, x_scale, y[t][r][h])
                                          : _mm256_fmadd_ps(_mm256_mul_ps(sum, x_scale), scale, y[t][r][h]);
          }
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      for (int h = 0; h < 2; ++h) {
        const std::int64_t at = S * t + 8 * h, own = count - at < 8 ? count - at : 8;
        if (own <= 0) continue;
        const auto* const of_rows = reinterpret_cast<const float*>(scales + t * bytes) + 8 * h;
        for (int r = 0; r < R; ++r) {
          Vec8 out = {y[t][r][h]};
          if constexpr (format.row_scale) out = out * Vec8::load(of_rows);
          if (args.bias) out = out + Vec8::load_some(args.bias + n + at, own);
          out.store_some(args.y + (m + r) * N + n + at, own);
        }
      }
    }
  }
};

}  // namespace

const LinearKernel moss_linear_f32_int8_block_int8_avx2 = {
    kAvx2, "moss_linear_f32_int8_block_int8_avx2", &kX86Layout,
    run_strips<Strip<WeightName::int8>>};
const LinearKernel moss_linear_f32_int8_block_int8_g32_avx2 = {
    kAvx2, "moss_linear_f32_int8_block_int8_g32_avx2", &kX86Layout,
    run_strips<Strip<WeightName::int8_g32>>};
const LinearKernel moss_linear_f32_int8_block_int4_g32_avx2 = {
    kAvx2, "moss_linear_f32_int8_block_int4_g32_avx2", &kX86Layout,
    run_strips<Strip<WeightName::int4_g32>>};
const LinearKernel moss_linear_f32_int8_block_int4_g128_avx2 = {
    kAvx2, "moss_linear_f32_int8_block_int4_g128_avx2", &kX86Layout,
    run_strips<Strip<WeightName::int4_g128>>};

}  // namespace moss
