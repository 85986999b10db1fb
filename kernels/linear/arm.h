// SPDX-License-Identifier: Apache-2.0
//
// The linear layer of int8 inputs on Arm, a template on the instruction that multiplies. Formula and shapes: linear.h;
// layout of the weights: layout.h. Only for files compiled with dotprod.
//
// A strip's weights of 8 columns are four vectors, each two outputs by 8 columns. Codes of 4 bits are shifted or masked
// into the upper half of a byte, so they are 16 times the code, and so is the sum of a block, which is divided again,
// exactly, as it becomes fp32.
//
// Up to kMostRows rows go through a strip together, so that weights are loaded and unpacked once for them. Each output
// goes through the same operations whatever the number of rows.

#ifndef MOSS_KERNELS_LINEAR_ARM_H_
#define MOSS_KERNELS_LINEAR_ARM_H_

#include <arm_neon.h>

#include <cstdint>

#include "linear.h"
#include "strips.h"

namespace moss {
namespace {

constexpr std::int64_t S = kArmLayout.strip;
constexpr int kPairs = S / 2;  // of outputs

// 32 columns of R rows, C codes each.
template <int R>
struct Columns {
  int8x16_t halves[R][2];

  Columns(const std::int8_t* x, std::int64_t C) {
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) halves[r][half] = vld1q_s8(x + r * C + 16 * half);
    }
  }
};

// The integers of R rows by sdot, which adds 4 products to each of four sums: a pair's are two of either output.
template <int R>
struct DotSums {
  int32x4_t sums[R][kPairs];

  DotSums() {
    for (auto& row : sums) {
      for (int32x4_t& pair : row) pair = vdupq_n_s32(0);
    }
  }

  // Adds the products of columns 8 * step .. 8 * step + 7.
  void add(const int8x16_t (&weights)[kPairs], const Columns<R>& x, int step) {
    for (int r = 0; r < R; ++r) {
      const int64x2_t half = vreinterpretq_s64_s8(x.halves[r][step / 2]);
      const int8x16_t both = vreinterpretq_s8_s64(step % 2 ? vdupq_laneq_s64(half, 1) : vdupq_laneq_s64(half, 0));
      for (int p = 0; p < kPairs; ++p) sums[r][p] = vdotq_s32(sums[r][p], weights[p], both);
    }
  }

  // Outputs 4 * quad .. 4 * quad + 3 of row r.
  int32x4_t outputs(int r, int quad) const { return vpaddq_s32(sums[r][2 * quad], sums[r][2 * quad + 1]); }
};

// values + those of `count` outputs.
inline void add_some(const float* p, std::int64_t count, float32x4_t (&values)[2]) {
  float all[S] = {};
  for (std::int64_t i = 0; count < S && i < count; ++i) all[i] = p[i];
  const float* const whole = count < S ? all : p;
  for (int quad = 0; quad < 2; ++quad) values[quad] = vaddq_f32(values[quad], vld1q_f32(whole + 4 * quad));
}

inline void store_some(const float32x4_t (&values)[2], std::int64_t count, float* p) {
  float all[S];
  float* const whole = count < S ? all : p;
  for (int quad = 0; quad < 2; ++quad) vst1q_f32(whole + 4 * quad, values[quad]);
  for (std::int64_t i = 0; count < S && i < count; ++i) p[i] = all[i];
}

// Sums<R>: the integers of R rows.
template <WeightName weight, template <int> class Sums>
struct Strip {
  static constexpr const LinearLayout& layout = kArmLayout;
  static constexpr WeightFormat format = weight_format(weight);
  static constexpr int kMostRows = 4;
  static constexpr int kMostStrips = 1;

  // Adds the products of a block.
  template <int R>
  static void add_block(const std::uint8_t* codes, const std::int8_t* x, std::int64_t C, Sums<R>& sums) {
    for (std::int64_t k = 0; k < format.block; k += 32) {
      const Columns<R> columns(x + k, C);
      for (int step = 0; step < format.bits / 2; ++step, codes += 8 * S) {
        int8x16_t weights[kPairs];
        if constexpr (format.bits == 8) {
          for (int p = 0; p < kPairs; ++p) weights[p] = vreinterpretq_s8_u8(vld1q_u8(codes + 16 * p));
          sums.add(weights, columns, step);
        } else {
          int8x16_t upper[kPairs];
          for (int p = 0; p < kPairs; ++p) {
            const uint8x16_t both = vld1q_u8(codes + 16 * p);
            weights[p] = vreinterpretq_s8_u8(vshlq_n_u8(both, 4));
            upper[p] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(0xf0)));
          }
          sums.add(weights, columns, step);
          sums.add(upper, columns, step + 2);
        }
      }
    }
  }

  static float32x4_t exact(int32x4_t sum) {
    if constexpr (format.bits == 8) return vcvtq_f32_s32(sum);
    return vcvtq_n_f32_s32(sum, 4);  // of sum / 16
  }

  // The strip's scales, of a row or of a block.
  static void load_scales(const std::uint8_t* scales, float32x4_t (&values)[2]) {
    if constexpr (format.row_scale) {
      for (int quad = 0; quad < 2; ++quad) values[quad] = vreinterpretq_f32_u8(vld1q_u8(scales + 16 * quad));
    } else {
      const uint16x8_t upper = vreinterpretq_u16_u8(vld1q_u8(scales));
      values[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(upper), 16));
      values[1] = vreinterpretq_f32_u32(vshll_high_n_u16(upper, 16));
    }
  }

  template <int R>
  static void run(const LinearArgs& args, std::int64_t m, std::int64_t n, std::int64_t count,
                  const std::uint8_t* strip) {
    const std::int64_t N = args.shape.outputs, blocks = block_count(format, args.shape.columns);
    const std::int64_t C = blocks * format.block;
    const std::uint8_t* codes = strip;
    const std::uint8_t* scales = strip + strip_code_bytes(layout, format, args.shape.columns);
    const std::int8_t* x = args.x_codes + m * C;
    const float* const x_scales = args.x_scales + m * blocks;

    float32x4_t y[R][2], scale[2];
    for (auto& row : y) {
      for (float32x4_t& quad : row) quad = vdupq_n_f32(0);
    }
    for (std::int64_t b = 0; b < blocks; ++b, x += format.block, codes += block_code_bytes(format) * S) {
      Sums<R> sums;
      add_block<R>(codes, x, C, sums);
      if constexpr (!format.row_scale) load_scales(scales + b * S * 2, scale);
      for (int r = 0; r < R; ++r) {
        const float x_scale = x_scales[r * blocks + b];
        for (int quad = 0; quad < 2; ++quad) {
          const float32x4_t sum = exact(sums.outputs(r, quad));
          y[r][quad] = format.row_scale ? vfmaq_n_f32(y[r][quad], sum, x_scale)
                                        : vfmaq_f32(y[r][quad], vmulq_n_f32(sum, x_scale), scale[quad]);
        }
      }
    }
    if constexpr (format.row_scale) load_scales(scales, scale);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if constexpr (format.row_scale) {
        for (int quad = 0; quad < 2; ++quad) y[r][quad] = vmulq_f32(y[r][quad], scale[quad]);
      }
      if (args.bias) add_some(args.bias + n, count, y[r]);
      store_some(y[r], count, args.y + (m + r) * N + n);
    }
  }
};

}  // namespace
}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_ARM_H_
