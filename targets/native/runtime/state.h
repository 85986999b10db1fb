// SPDX-License-Identifier: Apache-2.0
//
// What a model carries from token to token, channels last (mixer/mixer.h).

#ifndef MOSS_NATIVE_STATE_H_
#define MOSS_NATIVE_STATE_H_

#include <cstdint>
#include <vector>

#include "model.h"

namespace moss {

// The state of a layer's scan, in the format of the model.
struct Scanned {
  StateName format;
  void* h;        // [B, strips, N, kMaxLanes]
  float* scales;  // int8: [B, strips, kMaxLanes]
};

class State {
 public:
  // Zeros: before the first token.
  State(const Model& model, std::int64_t batch);

  const Model& model() const { return *model_; }
  std::int64_t batch() const { return batch_; }
  // Tokens since it began.
  std::int64_t position() const { return position_; }
  void set_position(std::int64_t position) { position_ = position; }

  float* window(std::int64_t layer) { return at<float>(lines_, place(layer).window); }  // [B, W-1, E]
  Scanned scanned(std::int64_t layer) {
    return {place(layer).format, at<void>(lines_, place(layer).h), at<float>(lines_, place(layer).scales)};
  }

  // Array `array` as moss.h orders them, channels first: [B, E, W-1] or [B, E, N]. What was read is written as it was;
  // other values are rounded to the nearest that the format has.
  std::int64_t arrays() const { return 2 * model_->config().layers; }
  void read(std::int64_t array, float* out) const;
  void write(std::int64_t array, const float* in);

 private:
  struct alignas(kScratchAlignmentBytes) Line {
    std::uint8_t bytes[kScratchAlignmentBytes];
  };
  // Of a layer: where its arrays begin, in lines.
  struct Place {
    StateName format;
    std::size_t window, h, scales;
  };

  const Place& place(std::int64_t layer) const { return places_[static_cast<std::size_t>(layer)]; }
  template <typename T, typename Lines>
  static T* at(Lines& lines, std::size_t line) {
    return reinterpret_cast<T*>(lines.data() + line);
  }

  const Model* model_;
  std::int64_t batch_;
  std::int64_t position_ = 0;
  std::vector<Place> places_;
  std::vector<Line> lines_;
};

}  // namespace moss

#endif  // MOSS_NATIVE_STATE_H_
