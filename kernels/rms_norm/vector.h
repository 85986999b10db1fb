// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm on vectors of neighbouring columns, a template on the vector type. Formula and shapes: rms_norm.h.

#ifndef MOSS_KERNELS_RMS_NORM_VECTOR_H_
#define MOSS_KERNELS_RMS_NORM_VECTOR_H_

#include "../vec/channels.h"
#include "rms_norm.h"

namespace moss {

// The sum of the squares of `count` values, in four sums that do not wait for one another.
template <typename Vec>
float sum_of_squares(const float* x, std::int64_t count) {
  Vec sums[4] = {Vec::set(0.0f), Vec::set(0.0f), Vec::set(0.0f), Vec::set(0.0f)};
  std::int64_t d = 0;
  for (; d + 4 * Vec::kLanes <= count; d += 4 * Vec::kLanes) {
    for (std::int64_t i = 0; i < 4; ++i) {
      const Vec values = Vec::load(x + d + i * Vec::kLanes);
      sums[i] = fma(values, values, sums[i]);
    }
  }
  for (; d < count; d += Vec::kLanes) {
    const Vec values = Channels<Vec>::of(d, count).load(x);
    sums[0] = fma(values, values, sums[0]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Vec>
void rms_norm(const RmsNormArgs<float>& args) {
  const std::int64_t D = args.columns;
  for (std::int64_t m = 0; m < args.rows; ++m) {
    const float* const x = args.x + m * D;
    const float mean = sum_of_squares<Vec>(x, D) / static_cast<float>(D);
    const Vec scale = Vec::set(1 / __builtin_sqrtf(mean + args.eps));
    for (std::int64_t d = 0; d < D; d += Vec::kLanes) {
      const auto columns = Channels<Vec>::of(d, D);
      columns.store(columns.load(x) * scale * columns.load(args.weight), args.y + m * D);
    }
  }
}

}  // namespace moss

#endif  // MOSS_KERNELS_RMS_NORM_VECTOR_H_
