// SPDX-License-Identifier: Apache-2.0

#include "tile.h"

namespace moss {
namespace {

template <typename Real>
void add_up(const Real* parts, std::int64_t count, std::int64_t size, Real* sum) {
  for (std::int64_t i = 0; i < size; ++i) sum[i] = Real(0);
  for (std::int64_t p = 0; p < count; ++p) {
    const Real* const part = parts + p * size;
    for (std::int64_t i = 0; i < size; ++i) sum[i] += part[i];
  }
}

}  // namespace

void sum_parts(const float* parts, std::int64_t count, std::int64_t size, float* sum) {
  add_up(parts, count, size, sum);
}

void sum_parts(const double* parts, std::int64_t count, std::int64_t size, double* sum) {
  add_up(parts, count, size, sum);
}

}  // namespace moss
