// SPDX-License-Identifier: Apache-2.0
//
// Convolution and scan as they are defined, one channel and one step at a time: the reference of the fast forms.
// Formulas and shapes: mixer.h.

#include <cmath>

#include "mixer.h"

namespace moss {
namespace {

void conv(const MixerConvArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  const std::int64_t T = args.time, E = args.channels, W = args.width;
  float* const window = args.window + b * (W - 1) * E;
  for (std::int64_t t = 0; t < T; ++t) {
    const float* const x = args.x + (b * T + t) * E;
    for (std::int64_t e = begin; e < end; ++e) {
      float p = args.bias[e];
      for (std::int64_t w = 0; w < W - 1; ++w) p += args.weight[w * E + e] * window[w * E + e];
      p += args.weight[(W - 1) * E + e] * x[e];
      for (std::int64_t w = 0; w < W - 2; ++w) window[w * E + e] = window[(w + 1) * E + e];
      if (W > 1) window[(W - 2) * E + e] = x[e];
      args.y[(b * T + t) * E + e] = p / (1 + std::exp(-p));
    }
  }
}

void scan(const MixerScanArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  const std::int64_t T = args.time, E = args.channels, N = args.states;
  for (std::int64_t t = 0; t < T; ++t) {
    const std::int64_t row = (b * T + t) * E;
    const float* const Bm = args.Bm + (b * T + t) * args.bc_stride;
    const float* const Cm = args.Cm + (b * T + t) * args.bc_stride;
    for (std::int64_t e = begin; e < end; ++e) {
      const float x = args.x[row + e], dt = args.dt[row + e], z = args.z[row + e];
      const float delta = std::fmax(dt, 0.0f) + std::log1p(std::exp(-std::fabs(dt)));
      float y = args.D[e] * x;
      for (std::int64_t n = 0; n < N; ++n) {
        float& h = args.h[b * strip_count(E) * N * kMaxLanes + in_strips(e, n, N)];
        h = std::exp2(delta * args.rate[in_strips(e, n, N)]) * h + delta * x * Bm[n];
        y += h * Cm[n];
      }
      args.y[row + e] = y * (z / (1 + std::exp(-z)));
    }
  }
}

}  // namespace

const MixerKernel moss_mixer_f32_scalar = {kBaseline, "moss_mixer_f32_scalar", conv, scan};

}  // namespace moss
