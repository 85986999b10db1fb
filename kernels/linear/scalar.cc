// SPDX-License-Identifier: Apache-2.0
//
// The linear layer as it is defined, one output and one column at a time: the reference of the fast forms. Formula,
// shapes and order of the sums: linear.h; layout of the weights: layout.h.

#include <algorithm>
#include <cstring>

#include "linear.h"

namespace moss {
namespace {

// Code k of a block of packed codes.
template <WeightName weight>
std::int32_t code_at(const std::uint8_t* codes, std::int64_t k) {
  if constexpr (weight_format(weight).bits == 8) return static_cast<std::int8_t>(codes[k]);
  const std::uint8_t both = codes[k / 32 * 16 + k % 16];
  return (k % 32 < 16 ? both & 0xf : both >> 4) - 8;
}

// Scale b of those that lie behind a row's codes.
template <WeightName weight>
float scale_at(const std::uint8_t* scales, std::int64_t b) {
  std::uint32_t bits;
  if constexpr (weight_format(weight).row_scale) {
    std::memcpy(&bits, scales, 4);
  } else {
    std::uint16_t upper;
    std::memcpy(&upper, scales + 2 * b, 2);
    bits = static_cast<std::uint32_t>(upper) << 16;
  }
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

// s_b: what a row of x and a block of codes give before the weight's scale.
template <LinearInput input, WeightName weight>
float block_sum(const LinearArgs& args, std::int64_t m, std::int64_t b, const std::uint8_t* codes) {
  constexpr std::int64_t B = weight_format(weight).block;
  const std::int64_t K = args.shape.columns, blocks = block_count(weight_format(weight), K);
  if constexpr (input == LinearInput::f32) {
    const float* const x = args.x + m * K + b * B;
    float sum = 0;
    for (std::int64_t k = 0; k < std::min(B, K - b * B); ++k) {
      sum += x[k] * static_cast<float>(code_at<weight>(codes, k));
    }
    return sum;
  } else {
    const std::int8_t* const x = args.x_codes + (m * blocks + b) * B;
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < B; ++k) sum += x[k] * code_at<weight>(codes, k);
    return static_cast<float>(sum) * args.x_scales[m * blocks + b];
  }
}

template <LinearInput input, WeightName weight>
void run(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr WeightFormat format = weight_format(weight);
  const std::int64_t K = args.shape.columns, N = args.shape.outputs, blocks = block_count(format, K);
  for (std::int64_t n = begin; n < end; ++n) {
    const std::uint8_t* const codes = args.weight + n * strip_bytes(kRowsLayout, format, K);
    const std::uint8_t* const scales = codes + strip_code_bytes(kRowsLayout, format, K);
    for (std::int64_t m = 0; m < args.shape.rows; ++m) {
      float y = 0;
      for (std::int64_t b = 0; b < blocks; ++b) {
        const float sum = block_sum<input, weight>(args, m, b, codes + b * block_code_bytes(format));
        y += format.row_scale ? sum : sum * scale_at<weight>(scales, b);
      }
      if (format.row_scale) y *= scale_at<weight>(scales, 0);
      args.y[m * N + n] = args.bias ? y + args.bias[n] : y;
    }
  }
}

}  // namespace

const LinearKernel moss_linear_f32_int8_block_int8_scalar = {
    kBaseline, "moss_linear_f32_int8_block_int8_scalar", &kRowsLayout,
    run<LinearInput::int8_block, WeightName::int8>};
const LinearKernel moss_linear_f32_int8_block_int8_g32_scalar = {
    kBaseline, "moss_linear_f32_int8_block_int8_g32_scalar", &kRowsLayout,
    run<LinearInput::int8_block, WeightName::int8_g32>};
const LinearKernel moss_linear_f32_int8_block_int4_g32_scalar = {
    kBaseline, "moss_linear_f32_int8_block_int4_g32_scalar", &kRowsLayout,
    run<LinearInput::int8_block, WeightName::int4_g32>};
const LinearKernel moss_linear_f32_int8_block_int4_g128_scalar = {
    kBaseline, "moss_linear_f32_int8_block_int4_g128_scalar", &kRowsLayout,
    run<LinearInput::int8_block, WeightName::int4_g128>};
const LinearKernel moss_linear_f32_f32_int8_scalar = {
    kBaseline, "moss_linear_f32_f32_int8_scalar", &kRowsLayout,
    run<LinearInput::f32, WeightName::int8>};
const LinearKernel moss_linear_f32_f32_int8_g32_scalar = {
    kBaseline, "moss_linear_f32_f32_int8_g32_scalar", &kRowsLayout,
    run<LinearInput::f32, WeightName::int8_g32>};
const LinearKernel moss_linear_f32_f32_int4_g32_scalar = {
    kBaseline, "moss_linear_f32_f32_int4_g32_scalar", &kRowsLayout,
    run<LinearInput::f32, WeightName::int4_g32>};
const LinearKernel moss_linear_f32_f32_int4_g128_scalar = {
    kBaseline, "moss_linear_f32_f32_int4_g128_scalar", &kRowsLayout,
    run<LinearInput::f32, WeightName::int4_g128>};

}  // namespace moss
