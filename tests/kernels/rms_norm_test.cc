// SPDX-License-Identifier: Apache-2.0
//
// Every RMSNorm kernel in the list that this machine can run, against the scalar form in float64, into another array
// and in place, aligned to nothing beyond the type. Meant for the sanitizers; the mathematics is checked in
// test_rms_norm.py.

#include "rms_norm/rms_norm.h"

#include "compare.h"

namespace moss_tests {
namespace {

bool test_shape(std::int64_t rows, std::int64_t columns) {
  Random random(static_cast<unsigned>(1 + rows + 131 * columns));
  const Floats x = random.normal(rows * columns), weight = random.normal(columns);
  const Doubles exact = doubles(x), exact_weight = doubles(weight);
  Doubles expected = unset<double>(rows * columns);
  moss::moss_rms_norm_f64_scalar.run({rows, columns, exact.data(), exact_weight.data(), 1e-5, expected.data()});

  bool passed = true;
  for (const auto* kernel : moss::rms_norm_kernels<float>()) {
    if (!runs_here(*kernel)) continue;
    char at[160];
    std::snprintf(at, sizeof(at), "%s M %d D %d ", kernel->name, static_cast<int>(rows), static_cast<int>(columns));
    Shifted<float> y(unset<float>(rows * columns)), place(x), own_weight(weight);
    kernel->run({rows, columns, x.data(), own_weight.data(), 1e-5f, y.data()});
    kernel->run({rows, columns, place.data(), own_weight.data(), 1e-5f, place.data()});
    passed = close(std::string(at) + "y", y.own(), expected) && passed;
    passed = close(std::string(at) + "in place", place.own(), expected) && passed;
  }
  return passed;
}

}  // namespace

bool test_rms_norm() {
  bool passed = true;
  for (std::int64_t rows : {0, 1, 3}) {
    for (std::int64_t columns : {1, 7, 16, 33, 100, 257}) passed = test_shape(rows, columns) && passed;
  }
  return passed;
}

}  // namespace moss_tests
