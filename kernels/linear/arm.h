// SPDX-License-Identifier: Apache-2.0
//
// The linear layer of int8 inputs on Arm, a template on the instruction that multiplies. Formula and shapes: linear.h;
// layout of the weights: layout.h. Only for files compiled with dotprod.
//
// A strip's weights of 8 columns are four vectors, each two outputs by 8 columns. Codes of 4 bits are shifted, or masked,
// to the upper half of a byte, so they are 16 times the code, and so is the sum of a block, which is divided again,
// exactly, as it becomes fp32.
//
// Up to four rows go through a strip together, so that weights are loaded and unpacked once for them. Each output goes
// through the same operations whatever the number of rows.

#ifndef MOSS_KERNELS_LINEAR_ARM_H_
#define MOSS_KERNELS_LINEAR_ARM_H_

#include <arm_neon.h>

#include <cstdint>

#include "linear.h"

namespace moss {
namespace {

constexpr std::int64_t S = kArmLayout.strip;
constexpr int kPairs = S / 2;                      // of outputs
constexpr std::int64_t kResidentBytes = 1 << 17;  // of input codes, which stay in the second cache while strips pass

// 32 columns of R rows.
template <int R>
struct Columns {
  int8x16_t halves[R][2];

  static Columns load(const std::int8_t* const (&rows)[R], std::int64_t k) {
    Columns x;
    for (int r = 0; r < R; ++r) {
      x.halves[r][0] = vld1q_s8(rows[r] + k);
      x.halves[r][1] = vld1q_s8(rows[r] + k + 16);
    }
    return x;
  }
};

// The integers of R rows by sdot, which adds 4 products to each of four sums: a pair's are two of either output.
template <int R>
struct DotSums {
  static constexpr int kRows = R;
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

// fp32 from a block's sum.
template <WeightName weight>
inline float32x4_t exact(int32x4_t sum) {
  if constexpr (weight_format(weight).bits == 8) return vcvtq_f32_s32(sum);
  return vcvtq_n_f32_s32(sum, 4);  // of sum / 16
}

// Adds the products of a block, whose codes of the strip and columns of the rows are given.
template <WeightName weight, typename Sums>
inline void add_block(Sums& sums, const std::uint8_t* codes, const std::int8_t* const (&rows)[Sums::kRows]) {
  constexpr WeightFormat format = weight_format(weight);
  for (std::int64_t k = 0; k < format.block; k += 32) {
    const auto x = Columns<Sums::kRows>::load(rows, k);
    for (int step = 0; step < format.bits / 2; ++step, codes += 8 * S) {
      int8x16_t weights[kPairs];
      if constexpr (format.bits == 8) {
        for (int p = 0; p < kPairs; ++p) weights[p] = vreinterpretq_s8_u8(vld1q_u8(codes + 16 * p));
        sums.add(weights, x, step);
      } else {
        int8x16_t upper[kPairs];
        for (int p = 0; p < kPairs; ++p) {
          const uint8x16_t both = vld1q_u8(codes + 16 * p);
          weights[p] = vreinterpretq_s8_u8(vshlq_n_u8(both, 4));
          upper[p] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(0xf0)));
        }
        sums.add(weights, x, step);
        sums.add(upper, x, step + 2);
      }
    }
  }
}

// The strip's scales: of a row, or of block b.
template <WeightName weight>
inline void load_scales(const std::uint8_t* scales, std::int64_t b, float32x4_t (&values)[2]) {
  if constexpr (weight_format(weight).row_scale) {
    for (int quad = 0; quad < 2; ++quad) values[quad] = vreinterpretq_f32_u8(vld1q_u8(scales + 16 * quad));
  } else {
    const uint16x8_t upper = vreinterpretq_u16_u8(vld1q_u8(scales + b * S * 2));
    values[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(upper), 16));
    values[1] = vreinterpretq_f32_u32(vshll_high_n_u16(upper, 16));
  }
}

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

// `count` rows from m on, 1 .. Sums::kRows, and the strip of outputs n .. end - 1, at most S of them. In the place of
// rows that are missing the last is done again.
template <WeightName weight, typename Sums>
void run_strip(const LinearArgs& args, std::int64_t m, std::int64_t count, std::int64_t n, std::int64_t end) {
  constexpr WeightFormat format = weight_format(weight);
  constexpr int R = Sums::kRows;
  const std::int64_t K = args.shape.columns, N = args.shape.outputs, blocks = block_count(format, K);
  const std::uint8_t* codes = args.weight + n / S * strip_bytes(kArmLayout, format, K);
  const std::uint8_t* const scales = codes + strip_code_bytes(kArmLayout, format, K);
  const std::int8_t* rows[R];
  const float* x_scales[R];
  float* outputs[R];
  float32x4_t y[R][2], scale[2];
  for (int r = 0; r < R; ++r) {
    const std::int64_t row = m + (r < count ? r : count - 1);
    rows[r] = args.x_codes + row * blocks * format.block;
    x_scales[r] = args.x_scales + row * blocks;
    outputs[r] = args.y + row * N + n;
    for (float32x4_t& quad : y[r]) quad = vdupq_n_f32(0);
  }
  for (std::int64_t b = 0; b < blocks; ++b, codes += block_code_bytes(format) * S) {
    Sums sums;
    add_block<weight>(sums, codes, rows);
    if constexpr (!format.row_scale) load_scales<weight>(scales, b, scale);
    for (int r = 0; r < R; ++r) {
      rows[r] += format.block;
      for (int quad = 0; quad < 2; ++quad) {
        const float32x4_t sum = exact<weight>(sums.outputs(r, quad));
        if constexpr (format.row_scale) {
          y[r][quad] = vfmaq_n_f32(y[r][quad], sum, x_scales[r][b]);
        } else {
          y[r][quad] = vfmaq_f32(y[r][quad], vmulq_n_f32(sum, x_scales[r][b]), scale[quad]);
        }
      }
    }
  }
  const std::int64_t width = end - n < S ? end - n : S;
  if constexpr (format.row_scale) load_scales<weight>(scales, 0, scale);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if constexpr (format.row_scale) {
      for (int quad = 0; quad < 2; ++quad) y[r][quad] = vmulq_f32(y[r][quad], scale[quad]);
    }
    if (args.bias) add_some(args.bias + n, width, y[r]);
    store_some(y[r], width, outputs[r]);
  }
}

// Sums1, Sums2, Sums4: the integers of so many rows.
template <WeightName weight, typename Sums1, typename Sums2, typename Sums4>
void run_strips(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr WeightFormat format = weight_format(weight);
  const std::int64_t M = args.shape.rows, row_bytes = block_count(format, args.shape.columns) * format.block;
  const std::int64_t fours = kResidentBytes / row_bytes / 4, resident = fours > 0 ? 4 * fours : 4;  // rows
  for (std::int64_t first = 0; first < M; first += resident) {
    const std::int64_t last = M - first < resident ? M : first + resident;
    for (std::int64_t n = begin; n < end; n += S) {
      for (std::int64_t m = first; m < last; m += 4) {
        if (last - m == 1) {
          run_strip<weight, Sums1>(args, m, 1, n, end);
        } else if (last - m == 2) {
          run_strip<weight, Sums2>(args, m, 2, n, end);
        } else {
          run_strip<weight, Sums4>(args, m, last - m < 4 ? last - m : 4, n, end);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_ARM_H_
