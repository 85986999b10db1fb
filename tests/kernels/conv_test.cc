// SPDX-License-Identifier: Apache-2.0
//
// Every convolution kernel in the list that this machine can run, against the scalar form in float64: all outputs and
// gradients, at sizes around the vector, tile, chunk and width. Meant for the sanitizers; the mathematics is checked in
// test_conv.py.

#include "conv/conv.h"

#include "compare.h"

namespace moss_tests {
namespace {

template <typename Real>
struct Results {
  std::vector<Real> y, new_window, dx, dwindow, dweight, dbias;
};

template <typename Real>
struct Inputs {
  std::vector<Real> x, weight, bias, window, dy, dnew_window;
};

// `windows`: with a first window and a gradient of the last; otherwise those are null.
template <typename Real>
Results<Real> run(const moss::ConvKernel<Real>& kernel, const moss::ConvShape& shape, const Inputs<Real>& in,
                  bool windows) {
  const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, W = shape.width;
  Results<Real> out;
  out.y = out.dx = unset<Real>(B * T * E);
  out.new_window = out.dwindow = unset<Real>(B * E * (W - 1));
  out.dweight = unset<Real>(B * E * W);
  out.dbias = unset<Real>(B * E);

  const Real* const window = windows ? in.window.data() : nullptr;
  const moss::ConvForward<Real> forward = {
      shape, in.x.data(), in.weight.data(), in.bias.data(), window, out.y.data(), out.new_window.data()};
  const moss::ConvBackward<Real> backward = {shape,
                                             in.x.data(),
                                             in.weight.data(),
                                             in.bias.data(),
                                             window,
                                             in.dy.data(),
                                             windows ? in.dnew_window.data() : nullptr,
                                             out.dx.data(),
                                             out.dwindow.data(),
                                             out.dweight.data(),
                                             out.dbias.data()};
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t tile = 0; tile < moss::tile_count(E); ++tile) {
      kernel.forward(forward, b, tile, Scratch<Real>(moss::conv_scratch_size(W)).data.get());
      kernel.backward(backward, b, tile, Scratch<Real>(moss::conv_scratch_size(W)).data.get());
    }
  }
  return out;
}

bool test_shape(const moss::ConvShape& shape, bool windows) {
  const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, W = shape.width;
  Random random(static_cast<unsigned>(1 + T + 131 * E + 7 * W));
  const Inputs<float> in = {random.normal(B * T * E),       random.normal(E * W),     random.normal(E),
                            random.normal(B * E * (W - 1)), random.normal(B * T * E), random.normal(B * E * (W - 1))};
  const Inputs<double> exact = {doubles(in.x),      doubles(in.weight), doubles(in.bias),
                                doubles(in.window), doubles(in.dy),     doubles(in.dnew_window)};
  const auto doubles_list = moss::conv_kernels<double>();
  const Results<double> expected = run(*doubles_list.kernels[doubles_list.count - 1], shape, exact, windows);

  bool passed = true;
  for (const auto* kernel : moss::conv_kernels<float>()) {
    if (!runs_here(*kernel)) continue;
    const Results<float> found = run(*kernel, shape, in, windows);
    char at[160];
    std::snprintf(at, sizeof(at), "%s B %d T %d E %d W %d ", kernel->name, static_cast<int>(B), static_cast<int>(T),
                  static_cast<int>(E), static_cast<int>(W));
    const auto check = [&](const char* name, const Floats& one, const Doubles& other) {
      passed = close(std::string(at) + name, one, other) && passed;
    };
    check("y", found.y, expected.y);
    check("new_window", found.new_window, expected.new_window);
    check("dx", found.dx, expected.dx);
    check("dwindow", found.dwindow, expected.dwindow);
    check("dweight", found.dweight, expected.dweight);
    check("dbias", found.dbias, expected.dbias);
  }
  return passed;
}

}  // namespace

bool test_conv() {
  bool passed = true;
  for (std::int64_t B : {1, 3}) {
    for (std::int64_t T : {0, 1, 2, 31, 32, 33, 100}) {
      for (std::int64_t E : {1, 7, 16, 33, 70}) {
        for (std::int64_t W : {1, 2, 4, 40}) passed = test_shape({B, T, E, W}, B > 1) && passed;
      }
    }
  }
  return passed;
}

}  // namespace moss_tests
