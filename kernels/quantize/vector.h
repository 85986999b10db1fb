// SPDX-License-Identifier: Apache-2.0
//
// The codes on vectors of neighbouring columns, a template on the instruction set. Formula and shapes: quantize.h. The
// same bits as the scalar form: nothing is fused, and what is added up are integers.
//
// `Isa` gives what the vector of vec/ does not: the largest of values without a sign that does not lose a NaN, and
// int32 in as many lanes. It lives in an unnamed namespace of its file, so that no code compiled for one instruction
// set can be linked into another.

#ifndef MOSS_KERNELS_QUANTIZE_VECTOR_H_
#define MOSS_KERNELS_QUANTIZE_VECTOR_H_

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "../vec/channels.h"
#include "quantize.h"

namespace moss {

// The largest |x| of `count` values; NaN where one of them is.
template <typename Isa>
float largest_of(const float* x, std::int64_t count) {
  using Vec = typename Isa::Vec;
  Vec largest = Vec::set(0.0f);
  for (std::int64_t k = 0; k < count; k += Vec::kLanes) {
    largest = Isa::larger(abs(Channels<Vec>::of(k, count).load(x)), largest);
  }
  return Isa::largest_lane(largest);
}

template <typename Isa>
void quantize(const QuantizeArgs& args) {
  using Vec = typename Isa::Vec;
  const std::int64_t K = args.columns, B = args.block, blocks = (K + B - 1) / B;
  for (std::int64_t m = 0; m < args.rows; ++m) {
    for (std::int64_t b = 0; b < blocks; ++b) {
      const float* const x = args.x + m * K + b * B;
      std::int8_t* const codes = args.codes + (m * blocks + b) * B;
      const std::int64_t count = B < K - b * B ? B : K - b * B;
      const float largest = largest_of<Isa>(x, count);
      const float reciprocal = 127 / largest;
      // Neither is infinity or NaN.
      const bool usable = largest <= FLT_MAX && reciprocal <= FLT_MAX;
      const std::int64_t written = usable ? count : 0;
      typename Isa::Ints sum = Isa::zeros();
      for (std::int64_t k = 0; k < written; k += Vec::kLanes) {
        const auto columns = Channels<Vec>::of(k, written);
        const typename Isa::Ints rounded = Isa::nearest(columns.load(x) * Vec::set(reciprocal));
        Isa::store(rounded, codes + k, columns.count);
        sum = Isa::add(sum, rounded);
      }
      std::memset(codes + written, 0, static_cast<std::size_t>(B - written));
      args.sums[m * blocks + b] = Isa::sum(sum);
      args.scales[m * blocks + b] = largest / 127;
    }
  }
}

}  // namespace moss

#endif  // MOSS_KERNELS_QUANTIZE_VECTOR_H_
