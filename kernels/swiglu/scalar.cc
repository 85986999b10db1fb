// SPDX-License-Identifier: Apache-2.0
//
// The gate as it is defined: the reference of the fast forms. Formula: swiglu.h.

#include <cmath>

#include "swiglu.h"

namespace moss {
namespace {

void run(const SwigluArgs& args) {
  for (std::int64_t i = 0; i < args.size; ++i) args.y[i] = args.a[i] / (1 + std::exp(-args.a[i])) * args.b[i];
}

}  // namespace

const SwigluKernel moss_swiglu_f32_scalar = {kBaseline, "moss_swiglu_f32_scalar", run};

}  // namespace moss
