// SPDX-License-Identifier: Apache-2.0
//
// The codes as they are defined, one at a time. Formula and shapes: quantize.h.

#include <algorithm>
#include <cmath>

#include "quantize.h"

namespace moss {
namespace {

// The largest |x| of `count` values; NaN where one of them is.
float largest_of(const float* x, std::int64_t count) {
  float largest = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    const float value = std::fabs(x[k]);
    if (value > largest || std::isnan(value)) largest = value;
  }
  return largest;
}

void run(const QuantizeArgs& args) {
  const std::int64_t K = args.columns, B = args.block, blocks = (K + B - 1) / B;
  for (std::int64_t m = 0; m < args.rows; ++m) {
    for (std::int64_t b = 0; b < blocks; ++b) {
      const float* const x = args.x + m * K + b * B;
      std::int8_t* const codes = args.codes + (m * blocks + b) * B;
      const std::int64_t count = std::min(B, K - b * B);
      const float largest = largest_of(x, count);
      const float reciprocal = 127 / largest;
      const bool usable = std::isfinite(largest) && std::isfinite(reciprocal);
      std::int32_t sum = 0;
      for (std::int64_t k = 0; k < B; ++k) {
        codes[k] = usable && k < count ? static_cast<std::int8_t>(std::nearbyint(x[k] * reciprocal)) : std::int8_t(0);
        sum += codes[k];
      }
      args.sums[m * blocks + b] = sum;
      args.scales[m * blocks + b] = largest / 127;
    }
  }
}

}  // namespace

const QuantizeKernel moss_quantize_int8_block_f32_scalar = {kBaseline, "moss_quantize_int8_block_f32_scalar", run};

}  // namespace moss
