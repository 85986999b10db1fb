// SPDX-License-Identifier: Apache-2.0
//
// The dense linear layer on vectors of columns, a template on the vector type. Formula and shapes: dense.h.

#ifndef MOSS_KERNELS_DENSE_VECTOR_H_
#define MOSS_KERNELS_DENSE_VECTOR_H_

#include "../vec/channels.h"
#include "dense.h"

namespace moss {

// y[m0 .. m0 + kRows - 1, n]: the row of weights is read once for all of them.
template <typename Vec, int kRows>
inline void dense_rows(const DenseArgs& args, std::int64_t m0, std::int64_t n) {
  const std::int64_t K = args.columns;
  Vec sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = Vec::set(0.0f);
  for (std::int64_t k = 0; k < K; k += Vec::kLanes) {
    const auto vector = Channels<Vec>::of(k, K);
    const Vec weight = vector.load(args.weight + n * K);
    for (int r = 0; r < kRows; ++r) sums[r] = fma(weight, vector.load(args.x + (m0 + r) * K), sums[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    args.y[(m0 + r) * args.outputs + n] = sum(sums[r]) + (args.bias ? args.bias[n] : 0.0f);
  }
}

template <typename Vec>
void dense(const DenseArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    std::int64_t m = 0;
    for (; m + 8 <= args.rows; m += 8) dense_rows<Vec, 8>(args, m, n);
    for (; m < args.rows; ++m) dense_rows<Vec, 1>(args, m, n);
  }
}

}  // namespace moss

#endif  // MOSS_KERNELS_DENSE_VECTOR_H_
