// SPDX-License-Identifier: Apache-2.0

#include "state.h"

namespace moss {

template <typename Visit>
void State::for_values(std::int64_t array, const Visit& visit) const {
  const std::int64_t E = model_->config().inner, own = size(array), columns = own / E;
  const std::int64_t layer = array / 2 * batch_ * (of_window() + of_ssm());
  const std::int64_t begin = layer + (array % 2 == 0 ? 0 : batch_ * of_window());
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t e = 0; e < E; ++e) {
      for (std::int64_t k = 0; k < columns; ++k) visit(begin + b * own + k * E + e, (b * E + e) * columns + k);
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
