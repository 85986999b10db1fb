// SPDX-License-Identifier: Apache-2.0
//
// Convolution and scan on vectors of neighbouring channels, a template on the vector type. Formulas, shapes: mixer.h.
//
// One vector of channels goes through a chunk of steps at a time. Within it the states are taken a few at a time
// (kStates), which stay in registers over the chunk's steps; what does not depend on the state is computed first, once
// a step. The order of the sum over states is that of a single step, so that cutting time changes no bit.

#ifndef MOSS_KERNELS_MIXER_VECTOR_H_
#define MOSS_KERNELS_MIXER_VECTOR_H_

#include <type_traits>

#include "../vec/channels.h"
#include "../vec/math.h"
#include "mixer.h"

namespace moss {

template <typename Vec>
void mixer_conv(const MixerConvArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  const std::int64_t T = args.time, E = args.channels, before = args.width - 1;
  float* const window = args.window + b * before * E;
  const float* const x = args.x + b * T * E;
  for (std::int64_t e = begin; e < end; e += Vec::kLanes) {
    const auto vector = Channels<Vec>::of(e, end);
    const Vec bias = vector.load(args.bias);
    for (std::int64_t t = 0; t < T; ++t) {
      Vec p = bias;
      for (std::int64_t w = 0; w <= before; ++w) {
        const std::int64_t at = t + w - before;
        const float* const input = at < 0 ? window + (at + before) * E : x + at * E;
        p = fma(vector.load(args.weight + w * E), vector.load(input), p);
      }
      vector.store(p * logistic(p), args.y + (b * T + t) * E);
    }
    for (std::int64_t w = 0; w < before; ++w) {
      const std::int64_t at = T - before + w;
      vector.store(vector.load(at < 0 ? window + (at + before) * E : x + at * E), window + w * E);
    }
  }
}

// kStates states of one vector through the steps of a chunk. rate, h: at state n of the vector's channels; Bm, Cm: at
// state n of the first step; delta, input (delta x), y: [steps, lanes], y is added to.
template <typename Vec, int kStates>
inline void mixer_states(std::int64_t steps, std::int64_t bc_stride, const float* rates, const float* Bm,
                         const float* Cm, const float* delta, const float* input, float* h, float* y) {
  Vec state[kStates], rate[kStates];
  for (int j = 0; j < kStates; ++j) {
    state[j] = Vec::load(h + j * kMaxLanes);
    rate[j] = Vec::load(rates + j * kMaxLanes);
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    const std::int64_t at = s * Vec::kLanes, row = s * bc_stride;
    const Vec step_delta = Vec::load(delta + at), step_input = Vec::load(input + at);
    Vec sum = Vec::load(y + at);
    for (int j = 0; j < kStates; ++j) {
      state[j] = fma(exp2_product(step_delta, rate[j]), state[j], step_input * Vec::set(Bm[row + j]));
      sum = fma(state[j], Vec::set(Cm[row + j]), sum);
    }
    sum.store(y + at);
  }
  for (int j = 0; j < kStates; ++j) state[j].store(h + j * kMaxLanes);
}

template <typename Vec>
void mixer_scan(const MixerScanArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t L = Vec::kLanes;
  const std::int64_t T = args.time, E = args.channels, N = args.states;
  alignas(kScratchAlignmentBytes) float delta[kChunk * kMaxLanes], input[kChunk * kMaxLanes], y[kChunk * kMaxLanes];
  float* const h = args.h + b * strip_count(E) * N * kMaxLanes;
  for (std::int64_t t0 = 0; t0 < T; t0 += kChunk) {
    const std::int64_t steps = chunk_steps(t0, T), first = b * T + t0;
    const float* const Bm = args.Bm + first * args.bc_stride;
    const float* const Cm = args.Cm + first * args.bc_stride;
    for (std::int64_t e = begin; e < end; e += L) {
      const auto vector = Channels<Vec>::of(e, end);
      const Vec D = vector.load(args.D);
      for (std::int64_t s = 0; s < steps; ++s) {
        const Vec x = vector.load(args.x + (first + s) * E);
        const Vec step = softplus(vector.load(args.dt + (first + s) * E));
        step.store(delta + s * L);
        (step * x).store(input + s * L);
        (D * x).store(y + s * L);
      }
      const auto states = [&](auto count, std::int64_t n) {
        const std::int64_t at = in_strips(e, n, N);
        mixer_states<Vec, decltype(count)::value>(steps, args.bc_stride, args.rate + at, Bm + n, Cm + n, delta, input,
                                                  h + at, y);
      };
      std::int64_t n = 0;
      for (; n + 4 <= N; n += 4) states(std::integral_constant<int, 4>(), n);
      for (; n < N; ++n) states(std::integral_constant<int, 1>(), n);
      for (std::int64_t s = 0; s < steps; ++s) {
        const Vec z = vector.load(args.z + (first + s) * E);
        vector.store(Vec::load(y + s * L) * (z * logistic(z)), args.y + (first + s) * E);
      }
    }
  }
}

}  // namespace moss

#endif  // MOSS_KERNELS_MIXER_VECTOR_H_
