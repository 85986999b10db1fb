// SPDX-License-Identifier: Apache-2.0

#include "state.h"

namespace moss {

template <typename Visit>
void State::for_values(std::int64_t array, const Visit& visit) const {
  const Config& config = model_->config();
  const bool window = array % 2 == 0;
  const std::int64_t E = config.inner, columns = window ? config.width - 1 : config.states;
  const std::int64_t layer = array / 2 * batch_ * (of_window() + of_ssm());
  for (std::int64_t b = 0; b < batch_; ++b) {
    const std::int64_t begin = layer + (window ? b * of_window() : batch_ * of_window() + b * of_ssm());
    for (std::int64_t e = 0; e < E; ++e) {
      for (std::int64_t k = 0; k < columns; ++k) {
        visit(begin + (window ? k * E + e : in_strips(e, k, columns)), (b * E + e) * columns + k);
      }
    }
  }
}

void State::read(std::int64_t array, float* out) const {
  for_values(array, [&](std::int64_t last, std::int64_t first) {
    out[first] = values_[static_cast<std::size_t>(last)];
  });
}

void State::write(std::int64_t array, const float* in) {
  for_values(array, [&](std::int64_t last, std::int64_t first) {
    values_[static_cast<std::size_t>(last)] = in[first];
  });
}

}  // namespace moss
