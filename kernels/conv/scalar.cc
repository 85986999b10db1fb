// SPDX-License-Identifier: Apache-2.0
//
// The convolution as it is defined, one channel and one step at a time: the reference of the vector forms, and the form
// for float64. Formula and shapes: conv.h.

#include <cmath>

#include "conv.h"

namespace moss {
namespace {

// The logistic function of p, and 1 minus it, from one exp without overflow or cancellation.
template <typename Real>
Real logistic(Real p, Real* rest) {
  const Real e = std::exp(-std::fabs(p));
  const Real larger = 1 / (1 + e), smaller = e / (1 + e);
  *rest = p < 0 ? larger : smaller;
  return p < 0 ? smaller : larger;
}

// One channel's inputs with the window before them: position 0 is the oldest of the window, W-1+t is step t.
template <typename Real>
struct Inputs {
  const Real* window;  // null: zeros
  const Real* x;
  std::int64_t channels, before;  // E, W-1

  Real operator[](std::int64_t position) const {
    if (position >= before) return x[(position - before) * channels];
    return window ? window[position] : Real(0);
  }
};

template <typename Real>
Real preactivation(const Inputs<Real>& inputs, const Real* weight, Real bias, std::int64_t W, std::int64_t t) {
  Real p = bias;
  for (std::int64_t w = 0; w < W; ++w) p += weight[w] * inputs[t + w];
  return p;
}

template <typename Real>
void forward(const ConvForward<Real>& args, std::int64_t b, std::int64_t tile, Real*) {
  const std::int64_t T = args.shape.time, E = args.shape.channels, W = args.shape.width;
  for (std::int64_t e = tile_begin(tile); e < tile_end(tile, E); ++e) {
    const std::int64_t window = (b * E + e) * (W - 1);
    const Inputs<Real> inputs{args.window ? args.window + window : nullptr, args.x + b * T * E + e, E, W - 1};
    for (std::int64_t t = 0; t < T; ++t) {
      const Real p = preactivation(inputs, args.weight + e * W, args.bias[e], W, t);
      Real rest;
      args.y[(b * T + t) * E + e] = p * logistic(p, &rest);
    }
    for (std::int64_t k = 0; k < W - 1; ++k) args.new_window[window + k] = inputs[T + k];
  }
}

template <typename Real>
void backward(const ConvBackward<Real>& args, std::int64_t b, std::int64_t tile, Real* scratch) {
  const std::int64_t T = args.shape.time, E = args.shape.channels, W = args.shape.width;
  Real* const d_ahead = scratch;  // [W], gradients of the inputs at positions t, t + 1, ..., t + W - 1
  for (std::int64_t e = tile_begin(tile); e < tile_end(tile, E); ++e) {
    const std::int64_t window = (b * E + e) * (W - 1);
    const Inputs<Real> inputs{args.window ? args.window + window : nullptr, args.x + b * T * E + e, E, W - 1};
    const Real* const weight = args.weight + e * W;
    Real* const dweight = args.dweight_parts + (b * E + e) * W;
    Real dbias = 0;
    const auto put = [&](std::int64_t position, Real d) {
      if (position < W - 1) {
        args.dwindow[window + position] = d;
      } else {
        args.dx[(b * T + position - (W - 1)) * E + e] = d;
      }
    };
    for (std::int64_t w = 0; w < W; ++w) dweight[w] = d_ahead[w] = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      const Real p = preactivation(inputs, weight, args.bias[e], W, t);
      Real rest;
      const Real s = logistic(p, &rest);
      const Real dp = args.dy[(b * T + t) * E + e] * s * (1 + p * rest);
      dbias += dp;
      for (std::int64_t w = 0; w < W; ++w) {
        dweight[w] += dp * inputs[t + w];
        d_ahead[w] += dp * weight[w];
      }
      put(t, d_ahead[0]);  // no later step reads this input
      for (std::int64_t w = 0; w + 1 < W; ++w) d_ahead[w] = d_ahead[w + 1];
      d_ahead[W - 1] = 0;
    }
    for (std::int64_t k = 0; k < W - 1; ++k) {
      put(T + k, d_ahead[k] + (args.dnew_window ? args.dnew_window[window + k] : Real(0)));
    }
    args.dbias_parts[b * E + e] = dbias;
  }
}

}  // namespace

const ConvKernel<float> moss_conv_f32_scalar = {kBaseline, "moss_conv_f32_scalar", forward<float>, backward<float>};
const ConvKernel<double> moss_conv_f64_scalar = {kBaseline, "moss_conv_f64_scalar", forward<double>, backward<double>};

}  // namespace moss
