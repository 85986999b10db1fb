// SPDX-License-Identifier: Apache-2.0
//
// A model's pass over tokens, and its blocks one by one.

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

// What a pass works with beside weights and states.
struct Work {
  const Kernels& kernels;
  const BlockShape& shape;
  Arena& arena;
  Profile& profile;
  Pool& pool;
};

// Reads tokens [B, T], each of the vocabulary, and advances the state.
void forward(Model& model, State& state, const std::int64_t* tokens, std::int64_t time, const Wanted& wanted);

// One block: residual [batch, time, D] += block(norm(residual)), states as in state.h. The arena grows with the rows.
void ssm_block(const Work& work, const Ssm& ssm, std::int64_t batch, std::int64_t time, float* residual, float* window,
               float* h);
void mlp_block(const Work& work, const Mlp& mlp, std::int64_t rows, float* residual);

// logits [rows, V] of the norm of residual [rows, D].
void logits_of(const Work& work, const float* norm, const Matrix& head, std::int64_t rows, const float* residual,
               float* logits);

}  // namespace moss

#endif  // MOSS_NATIVE_FORWARD_H_
