// SPDX-License-Identifier: Apache-2.0
//
// A model's pass over tokens.

#ifndef MOSS_NATIVE_FORWARD_H_
#define MOSS_NATIVE_FORWARD_H_

#include <cstdint>

#include "model.h"
#include "state.h"

namespace moss {

// Where logits go: `all` [B, T, V], or `last` [B, V]; or the `count` largest of the last position, largest first.
struct Wanted {
  float* all = nullptr;
  float* last = nullptr;
  std::int64_t count = 0;
  std::int64_t* top_tokens = nullptr;  // [B, count]
  float* top_logits = nullptr;         // [B, count]
};

// Reads tokens [B, T], each of the vocabulary, and advances the state.
void forward(Model& model, State& state, const std::int64_t* tokens, std::int64_t time, const Wanted& wanted);

}  // namespace moss

#endif  // MOSS_NATIVE_FORWARD_H_
