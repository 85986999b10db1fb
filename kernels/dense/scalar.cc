// SPDX-License-Identifier: Apache-2.0
//
// The dense linear layer as it is defined: the reference of the fast forms. Formula and shapes: dense.h.

#include "dense.h"

namespace moss {
namespace {

void run(const DenseArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t m = 0; m < args.rows; ++m) {
    for (std::int64_t n = begin; n < end; ++n) {
      float sum = 0;
      for (std::int64_t k = 0; k < args.columns; ++k) {
        sum += args.x[m * args.columns + k] * args.weight[n * args.columns + k];
      }
      args.y[m * args.outputs + n] = args.bias ? sum + args.bias[n] : sum;
    }
  }
}

}  // namespace

const DenseKernel moss_dense_f32_scalar = {kBaseline, "moss_dense_f32_scalar", run};

}  // namespace moss
