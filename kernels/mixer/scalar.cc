// SPDX-License-Identifier: Apache-2.0
//
// Convolution and scan as they are defined, one channel and one step at a time: the reference of the fast forms.
// Formulas and shapes: mixer.h.

#include <cmath>

#include "mixer.h"
#include "rounding.h"

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

void draw(const std::uint32_t* places, std::int64_t count, std::int64_t token, std::uint32_t* drawn) {
  const Draw own = Draw::of(token);
  for (std::int64_t i = 0; i < count; ++i) drawn[i] = own.at(places[i]);
}

template <StateName kFormat>
void scan(const MixerScanArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  const std::int64_t T = args.time, E = args.channels, N = args.states, strips = strip_count(E);
  const std::int64_t first = b * strips * N * kMaxLanes;
  for (std::int64_t t = 0; t < T; ++t) {
    const std::int64_t row = (b * T + t) * E;
    const float* const Bm = args.Bm + (b * T + t) * args.bc_stride;
    const float* const Cm = args.Cm + (b * T + t) * args.bc_stride;
    const Draw draw = Draw::of(args.position + t);
    const auto hash = [&](std::int64_t at) { return args.drawn && t == 0 ? args.drawn[at] : draw.at(args.places[at]); };
    for (std::int64_t e = begin; e < end; ++e) {
      const float x = args.x[row + e], dt = args.dt[row + e], z = args.z[row + e];
      const float delta = std::fmax(dt, 0.0f) + std::log1p(std::exp(-std::fabs(dt)));
      float y = args.D[e] * x, largest = 0;
      const auto advance = [&](float h, std::int64_t n) {
        h = std::exp2(delta * args.rate[in_strips(e, n, N)]) * h + delta * x * Bm[n];
        y += h * Cm[n];
        return h;
      };
      for (std::int64_t n = 0; n < N; ++n) {
        const std::int64_t at = in_strips(e, n, N);
        if constexpr (kFormat == StateName::fp32) {
          float& h = static_cast<float*>(args.h)[first + at];
          h = advance(h, n);
        } else if constexpr (kFormat == StateName::fp16) {
          std::uint16_t& h = static_cast<std::uint16_t*>(args.h)[first + at];
          h = to_half(rounded_to_half(advance(from_half(h), n), hash(at)));
        } else {
          const float scale = args.scales[b * strips * kMaxLanes + e];
          args.scratch[n] = advance(static_cast<std::int8_t*>(args.h)[first + at] * scale, n);
          const float magnitude = std::fabs(args.scratch[n]);
          if (magnitude > largest || std::isnan(magnitude)) largest = magnitude;  // NaN stays
        }
      }
      if constexpr (kFormat == StateName::int8) {
        const float reciprocal = code_reciprocal(largest);
        for (std::int64_t n = 0; n < N; ++n) {
          const std::int64_t at = in_strips(e, n, N);
          const float code = rounded_to_code(args.scratch[n], reciprocal, hash(at));
          static_cast<std::int8_t*>(args.h)[first + at] = static_cast<std::int8_t>(std::isnan(code) ? 0.0f : code);
        }
        args.scales[b * strips * kMaxLanes + e] = largest / 127;
      }
      args.y[row + e] = y * (z / (1 + std::exp(-z)));
    }
  }
}

}  // namespace

const MixerKernel moss_mixer_f32_scalar = {
    kBaseline, "moss_mixer_f32_scalar", conv, draw, {scan<StateName::fp32>, scan<StateName::fp16>, scan<StateName::int8>}};

}  // namespace moss
