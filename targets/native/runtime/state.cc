// SPDX-License-Identifier: Apache-2.0

#include "state.h"

#include <algorithm>
#include <cmath>

#include "mixer/rounding.h"

namespace moss {
namespace {

// The scale with which codes are exactly the values that such codes meant, or max|h| / 127. The largest code is 127, or
// 126 where rounding has taken it down; the quotient may be the scale's neighbour. NaN where a value is not finite: then
// all of the channel are read as NaN, as of the kernels.
float scale_of(const float* values, std::int64_t count) {
  float largest = 0;
  for (std::int64_t n = 0; n < count; ++n) {
    if (!std::isfinite(values[n])) return NAN;
    largest = std::fmax(largest, std::fabs(values[n]));
  }
  const auto exact = [&](float scale) {
    return std::all_of(values, values + count, [&](float h) { return std::rint(h / scale) * scale == h; });
  };
  for (const float top : {127.0f, 126.0f}) {
    const float scale = largest / top;
    for (const float near : {scale, std::nextafter(scale, 0.0f), std::nextafter(scale, HUGE_VALF)}) {
      if (near > 0 && exact(near)) return near;
    }
  }
  return largest / 127;
}

}  // namespace

State::State(const Model& model, std::int64_t batch) : model_(&model), batch_(batch) {
  const Config& config = model.config();
  std::size_t lines = 0;
  const auto take = [&](std::int64_t bytes) {
    const std::size_t begin = lines;
    lines += (static_cast<std::size_t>(bytes) + sizeof(Line) - 1) / sizeof(Line);
    return begin;
  };
  for (const StateName format : config.ssm_states) {
    const std::int64_t channels = batch * strip_count(config.inner) * kMaxLanes;
    const std::size_t window = take(batch * (config.width - 1) * config.inner * 4);
    const std::size_t h = take(channels * config.states * kStateFormats[static_cast<int>(format)].bytes);
    places_.push_back({format, window, h, take(format == StateName::int8 ? channels * 4 : 0)});
  }
  lines_.resize(lines);
}

void State::read(std::int64_t array, float* out) const {
  const std::int64_t E = model_->config().inner, N = model_->config().states, W = model_->config().width;
  const Place& own = place(array / 2);
  const auto* const floats = at<const float>(lines_, own.h);
  const auto* const halves = at<const std::uint16_t>(lines_, own.h);
  const auto* const codes = at<const std::int8_t>(lines_, own.h);
  const auto* const scales = at<const float>(lines_, own.scales);
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t e = 0; e < E; ++e) {
      if (array % 2 == 0) {
        const float* const from = at<const float>(lines_, own.window) + b * (W - 1) * E + e;
        for (std::int64_t w = 0; w < W - 1; ++w) *out++ = from[w * E];
        continue;
      }
      const std::int64_t strips = strip_count(E);
      for (std::int64_t n = 0; n < N; ++n) {
        const std::int64_t i = b * strips * N * kMaxLanes + in_strips(e, n, N);
        switch (own.format) {
          case StateName::fp32: *out++ = floats[i]; break;
          case StateName::fp16: *out++ = from_half(halves[i]); break;
          case StateName::int8: *out++ = codes[i] * scales[b * strips * kMaxLanes + e];
        }
      }
    }
  }
}

void State::write(std::int64_t array, const float* in) {
  const std::int64_t E = model_->config().inner, N = model_->config().states, W = model_->config().width;
  const Scanned own = scanned(array / 2);
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t e = 0; e < E; ++e) {
      if (array % 2 == 0) {
        float* const to = window(array / 2) + b * (W - 1) * E + e;
        for (std::int64_t w = 0; w < W - 1; ++w) to[w * E] = *in++;
        continue;
      }
      const std::int64_t strips = strip_count(E);
      const float scale = own.format == StateName::int8 ? scale_of(in, N) : 0;
      if (own.format == StateName::int8) own.scales[b * strips * kMaxLanes + e] = scale;
      for (std::int64_t n = 0; n < N; ++n) {
        const std::int64_t i = b * strips * N * kMaxLanes + in_strips(e, n, N);
        const float h = *in++;
        switch (own.format) {
          case StateName::fp32: static_cast<float*>(own.h)[i] = h; break;
          case StateName::fp16: static_cast<std::uint16_t*>(own.h)[i] = to_half(h); break;
          case StateName::int8: {
            const float code = scale > 0 ? std::fmin(std::fmax(std::rint(h / scale), -127.0f), 127.0f) : 0;
            static_cast<std::int8_t*>(own.h)[i] = static_cast<std::int8_t>(code);
          }
        }
      }
    }
  }
}

}  // namespace moss
