// SPDX-License-Identifier: Apache-2.0
//
// The convolution on vectors of neighbouring channels, a template on the vector type. Formula and shapes: conv.h.
//
// A tile of channels goes through time a chunk at a time. A chunk's inputs lie in scratch behind the W-1 inputs before
// them: row r of [W-1 + kChunk, kTile] is position t0 + r of window and sequence together, and step s reads the rows
// s .. s+W-1. The backward keeps the gradients of the same rows; a chunk completes those of its first `steps` rows.

#ifndef MOSS_KERNELS_CONV_VECTOR_H_
#define MOSS_KERNELS_CONV_VECTOR_H_

#include "../vec/channels.h"
#include "../vec/math.h"
#include "conv.h"

namespace moss {

// One vector of step s, `inputs` and `weight` at its channels.
template <typename Vec>
inline Vec preactivation(const float* inputs, const float* weight, Vec bias, std::int64_t W) {
  Vec p = bias;
  for (std::int64_t w = 0; w < W; ++w) p = fma(Vec::load(weight + w * kTile), Vec::load(inputs + w * kTile), p);
  return p;
}

// Rows from .. from + count of [*, kTile] to the front.
static inline void move_to_front(float* rows, std::int64_t from, std::int64_t count) {
  for (std::int64_t i = 0; i < count * kTile; ++i) rows[i] = rows[from * kTile + i];
}

template <typename Vec>
void conv_forward(const ConvForward<float>& args, std::int64_t b, std::int64_t tile, float* scratch) {
  const std::int64_t T = args.shape.time, E = args.shape.channels, W = args.shape.width;
  const std::int64_t begin = tile_begin(tile), channels = tile_end(tile, E) - begin;
  const std::int64_t window = (b * E + begin) * (W - 1);
  float* const weight = scratch;             // [W, kTile]
  float* const inputs = weight + W * kTile;  // [W-1 + kChunk, kTile]
  transpose_in(args.weight + begin * W, channels, W, 1.0f, weight);
  transpose_in(args.window ? args.window + window : nullptr, channels, W - 1, 1.0f, inputs);
  for (std::int64_t t0 = 0; t0 < T; t0 += kChunk) {
    const std::int64_t steps = chunk_steps(t0, T);
    for (std::int64_t s = 0; s < steps; ++s) {
      const std::int64_t row = (b * T + t0 + s) * E + begin;
      for (std::int64_t c = 0; c < channels; c += Vec::kLanes) {
        const auto vector = Channels<Vec>::of(c, channels);
        vector.load(args.x + row).store(inputs + (W - 1 + s) * kTile + c);
        const Vec p = preactivation(inputs + s * kTile + c, weight + c, vector.load(args.bias + begin), W);
        vector.store(p * logistic(p), args.y + row);
      }
    }
    move_to_front(inputs, steps, W - 1);
  }
  transpose_out(inputs, channels, W - 1, args.new_window + window);
}

template <typename Vec>
void conv_backward(const ConvBackward<float>& args, std::int64_t b, std::int64_t tile, float* scratch) {
  const std::int64_t T = args.shape.time, E = args.shape.channels, W = args.shape.width;
  const std::int64_t begin = tile_begin(tile), channels = tile_end(tile, E) - begin;
  const std::int64_t window = (b * E + begin) * (W - 1);
  float* const weight = scratch;                              // [W, kTile]
  float* const dweight = weight + W * kTile;                  // [W, kTile]
  float* const dbias = dweight + W * kTile;                   // [kTile]
  float* const inputs = dbias + kTile;                        // [W-1 + kChunk, kTile]
  float* const d_inputs = inputs + (W - 1 + kChunk) * kTile;  // [W-1 + kChunk, kTile]
  float* const dwindow = d_inputs + (W - 1 + kChunk) * kTile;  // [W-1, kTile]
  transpose_in(args.weight + begin * W, channels, W, 1.0f, weight);
  transpose_in(args.window ? args.window + window : nullptr, channels, W - 1, 1.0f, inputs);
  set_zero(dweight, W * kTile);
  set_zero(dbias, kTile);
  set_zero(d_inputs, (W - 1 + kChunk) * kTile);

  // The gradient of a position of window and sequence together is complete.
  const auto put = [&](std::int64_t position, const float* d_input) {
    for (std::int64_t c = 0; c < channels; c += Vec::kLanes) {
      if (position < W - 1) {
        Vec::load(d_input + c).store(dwindow + position * kTile + c);
      } else {
        const std::int64_t row = (b * T + position - (W - 1)) * E + begin;
        Channels<Vec>::of(c, channels).store(Vec::load(d_input + c), args.dx + row);
      }
    }
  };

  for (std::int64_t t0 = 0; t0 < T; t0 += kChunk) {
    const std::int64_t steps = chunk_steps(t0, T);
    for (std::int64_t s = 0; s < steps; ++s) {
      const std::int64_t row = (b * T + t0 + s) * E + begin;
      for (std::int64_t c = 0; c < channels; c += Vec::kLanes) {
        const auto vector = Channels<Vec>::of(c, channels);
        vector.load(args.x + row).store(inputs + (W - 1 + s) * kTile + c);
        const Vec p = preactivation(inputs + s * kTile + c, weight + c, vector.load(args.bias + begin), W);
        Vec rest;
        const Vec logistic_p = logistic(p, &rest);
        const Vec dp = vector.load(args.dy + row) * logistic_p * fma(p, rest, Vec::set(1.0f));
        (Vec::load(dbias + c) + dp).store(dbias + c);
        for (std::int64_t w = 0; w < W; ++w) {
          const std::int64_t at = w * kTile + c, at_input = (s + w) * kTile + c;
          fma(dp, Vec::load(inputs + at_input), Vec::load(dweight + at)).store(dweight + at);
          fma(dp, Vec::load(weight + at), Vec::load(d_inputs + at_input)).store(d_inputs + at_input);
        }
      }
    }
    for (std::int64_t s = 0; s < steps; ++s) put(t0 + s, d_inputs + s * kTile);
    move_to_front(inputs, steps, W - 1);
    move_to_front(d_inputs, steps, W - 1);
    set_zero(d_inputs + (W - 1) * kTile, kChunk * kTile);
  }
  // The positions left are the new window; it may bring a gradient of its own.
  transpose_in(args.dnew_window ? args.dnew_window + window : nullptr, channels, W - 1, 1.0f, inputs);
  for (std::int64_t i = 0; i < (W - 1) * kTile; ++i) d_inputs[i] += inputs[i];
  for (std::int64_t k = 0; k < W - 1; ++k) put(T + k, d_inputs + k * kTile);
  transpose_out(dwindow, channels, W - 1, args.dwindow + window);
  transpose_out(dweight, channels, W, args.dweight_parts + (b * E + begin) * W);
  for (std::int64_t c = 0; c < channels; ++c) args.dbias_parts[b * E + begin + c] = dbias[c];
}

}  // namespace moss

#endif  // MOSS_KERNELS_CONV_VECTOR_H_
