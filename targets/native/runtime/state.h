// SPDX-License-Identifier: Apache-2.0
//
// What a model carries from token to token, channels last (mixer/mixer.h).

#ifndef MOSS_NATIVE_STATE_H_
#define MOSS_NATIVE_STATE_H_

#include <cstdint>
#include <vector>

#include "model.h"

namespace moss {

class State {
 public:
  // Zeros: before the first token.
  State(const Model& model, std::int64_t batch)
      : model_(&model),
        batch_(batch),
        values_(static_cast<std::size_t>(model.config().layers * batch * (of_window() + of_ssm()))) {}

  const Model& model() const { return *model_; }
  std::int64_t batch() const { return batch_; }

  // [B, W-1, E] and [B, strips, N, kMaxLanes]
  float* window(std::int64_t layer) { return values_.data() + layer * batch_ * (of_window() + of_ssm()); }
  float* ssm(std::int64_t layer) { return window(layer) + batch_ * of_window(); }

  // Array `array` as moss.h orders them, channels first: [B, E, W-1] or [B, E, N].
  std::int64_t arrays() const { return 2 * model_->config().layers; }
  void read(std::int64_t array, float* out) const;
  void write(std::int64_t array, const float* in);

 private:
  std::int64_t of_window() const { return (model_->config().width - 1) * model_->config().inner; }
  std::int64_t of_ssm() const { return strip_count(model_->config().inner) * kMaxLanes * model_->config().states; }
  // visit(index here, index channels first) for every value of an array.
  template <typename Visit>
  void for_values(std::int64_t array, const Visit& visit) const;

  const Model* model_;
  std::int64_t batch_;
  std::vector<float> values_;
};

}  // namespace moss

#endif  // MOSS_NATIVE_STATE_H_
