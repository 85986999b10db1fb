// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm as it is defined, one row and one column at a time. Formula and shapes: rms_norm.h.

#include <cmath>

#include "rms_norm.h"

namespace moss {
namespace {

template <typename Real>
void run(const RmsNormArgs<Real>& args) {
  const std::int64_t D = args.columns;
  for (std::int64_t m = 0; m < args.rows; ++m) {
    const Real* const x = args.x + m * D;
    Real squares = 0;
    for (std::int64_t d = 0; d < D; ++d) squares += x[d] * x[d];
    const Real scale = 1 / std::sqrt(squares / static_cast<Real>(D) + args.eps);
    for (std::int64_t d = 0; d < D; ++d) args.y[m * D + d] = x[d] * scale * args.weight[d];
  }
}

}  // namespace

const RmsNormKernel<float> moss_rms_norm_f32_scalar = {kBaseline, "moss_rms_norm_f32_scalar", run<float>};
const RmsNormKernel<double> moss_rms_norm_f64_scalar = {kBaseline, "moss_rms_norm_f64_scalar", run<double>};

}  // namespace moss
