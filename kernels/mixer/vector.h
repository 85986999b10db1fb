// SPDX-License-Identifier: Apache-2.0
//
// Convolution and scan on vectors of neighbouring channels, a template on the vector type. Formulas, shapes: mixer.h.
//
// One vector of channels goes through a chunk of steps at a time. Within it the states are taken a few at a time
// (kStates), which stay in registers over the chunk's steps, or all after one another where they share a scale; what
// does not depend on the state is computed first, once a step. A call of a single step keeps nothing of that in memory
// (mixer_step). The order of the sum over states is that of a single
// step, so that cutting time changes no bit.

#ifndef MOSS_KERNELS_MIXER_VECTOR_H_
#define MOSS_KERNELS_MIXER_VECTOR_H_

#include <type_traits>

#include "../vec/channels.h"
#include "../vec/math.h"
#include "mixer.h"
#include "rounding.h"

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

// How the states of a format lie in memory. Tags, and what is done with the values of a vector.
namespace {

struct Fp32 {
  using Stored = float;
  template <typename Vec>
  static Vec load(const float* p) {
    return Vec::load(p);
  }
  template <typename Vec>
  static void store(Vec h, float* p) {
    h.store(p);
  }
};

struct Fp16 {
  using Stored = std::uint16_t;
  template <typename Vec>
  static Vec load(const std::uint16_t* p) {
    return Vec::load_half(p);
  }
  template <typename Vec>
  static void store(Vec h, std::uint16_t* p) {
    h.store_half(p);
  }
};

struct Int8 {
  using Stored = std::int8_t;
};

}  // namespace

// A chunk of steps of one vector of channels.
struct MixerSteps {
  std::int64_t count;
  std::int64_t states;
  std::int64_t position;  // of the first
  const float* delta;     // [count, lanes]
  const float* input;     // [count, lanes]: delta x
  float* y;               // [count, lanes]; is added to
  const float* Bm;        // [count] rows of N
  const float* Cm;        // [count] rows of N
  std::int64_t bc_stride;
  const float* rate;            // these, at the vector's channels of state 0
  const std::uint32_t* places;
  const std::uint32_t* drawn;  // of the first step; may be null
};

template <typename Vec>
void mixer_draw(const std::uint32_t* places, std::int64_t count, std::int64_t token, std::uint32_t* drawn) {
  const Draw own = Draw::of(token);
  for (std::int64_t i = 0; i < count; i += Vec::kLanes) Vec::store_bits(drawn_bits<Vec>(places + i, own), drawn + i);
}

// What rounds state n at a step.
template <typename Vec>
inline typename Vec::Bits drawn_at(const MixerSteps& steps, std::int64_t s, std::int64_t n, Draw draw) {
  if (steps.drawn && s == 0) return Vec::load_bits(steps.drawn + n * kMaxLanes);
  return drawn_bits<Vec>(steps.places + n * kMaxLanes, draw);
}

// kStates states from the n-th on through the steps; h at state 0.
template <typename Vec, typename Format, int kStates>
inline void mixer_states(const MixerSteps& steps, std::int64_t n, typename Format::Stored* h) {
  constexpr bool kRounds = !std::is_same_v<Format, Fp32>;
  Vec state[kStates], rate[kStates];
  for (int j = 0; j < kStates; ++j) {
    state[j] = Format::template load<Vec>(h + (n + j) * kMaxLanes);
    rate[j] = Vec::load(steps.rate + (n + j) * kMaxLanes);
  }
  for (std::int64_t s = 0; s < steps.count; ++s) {
    const std::int64_t at = s * Vec::kLanes, row = s * steps.bc_stride + n;
    const Vec step_delta = Vec::load(steps.delta + at), step_input = Vec::load(steps.input + at);
    Vec sum = Vec::load(steps.y + at);
    for (int j = 0; j < kStates; ++j) {
      state[j] = fma(exp2_product(step_delta, rate[j]), state[j], step_input * Vec::set(steps.Bm[row + j]));
      sum = fma(state[j], Vec::set(steps.Cm[row + j]), sum);
    }
    sum.store(steps.y + at);
    if constexpr (kRounds) {
      const Draw draw = Draw::of(steps.position + s);
      for (int j = 0; j < kStates; ++j) {
        state[j] = rounded_to_half<Vec>(state[j], drawn_at<Vec>(steps, s, n + j, draw));
      }
    }
  }
  for (int j = 0; j < kStates; ++j) Format::store(state[j], h + (n + j) * kMaxLanes);
}

// All states through the steps: a channel's scale depends on all of them. They are values in scratch [N, lanes].
template <typename Vec>
inline void mixer_codes(const MixerSteps& steps, std::int8_t* h, float* scales, float* scratch) {
  constexpr std::int64_t L = Vec::kLanes;
  const std::int64_t N = steps.states;
  Vec scale = Vec::load(scales);
  for (std::int64_t n = 0; n < N; ++n) (Vec::load_codes(h + n * kMaxLanes) * scale).store(scratch + n * L);
  for (std::int64_t s = 0; s < steps.count; ++s) {
    const float* const Bm = steps.Bm + s * steps.bc_stride;
    const float* const Cm = steps.Cm + s * steps.bc_stride;
    const Vec delta = Vec::load(steps.delta + s * L), input = Vec::load(steps.input + s * L);
    const typename Vec::Bits magnitude = Vec::set_bits(0x7fffffffu);
    Vec sum = Vec::load(steps.y + s * L);
    typename Vec::Bits most = Vec::set_bits(0);  // as integers, among which NaN is the largest
    for (std::int64_t n = 0; n < N; ++n) {
      const Vec rate = Vec::load(steps.rate + n * kMaxLanes);
      const Vec state = fma(exp2_product(delta, rate), Vec::load(scratch + n * L), input * Vec::set(Bm[n]));
      sum = fma(state, Vec::set(Cm[n]), sum);
      most = Vec::larger(most, state.bits() & magnitude);
      state.store(scratch + n * L);
    }
    sum.store(steps.y + s * L);
    const Vec largest = Vec::of_bits(most), reciprocal = code_reciprocal(largest);
    const Draw draw = Draw::of(steps.position + s);
    scale = largest / Vec::set(127.0f);
    for (std::int64_t n = 0; n < N; ++n) {
      const Vec code = rounded_to_code(Vec::load(scratch + n * L), reciprocal, drawn_at<Vec>(steps, s, n, draw));
      code.store_codes(h + n * kMaxLanes);
      (code * scale).store(scratch + n * L);
    }
  }
  scale.store(scales);
}

// Brings the state of the strip behind this one into the cache: a processor that reads ahead by itself stops at the end
// of a page, and many sequences have more states than it holds. Behind the last strip nothing is touched.
template <typename Stored>
inline void prefetch_next_strip(const Stored* h, std::int64_t states) {
  constexpr std::int64_t kLine = 64 / sizeof(Stored);
  const std::int64_t size = states * kMaxLanes;
  for (std::int64_t i = 0; i < size; i += kLine) __builtin_prefetch(h + size + i, 1);
}

// A single step of one vector of channels: what mixer_states does, with the sum over the states in a register.
template <typename Vec, typename Format>
inline Vec mixer_step(const MixerSteps& steps, Vec delta, Vec input, Vec sum, typename Format::Stored* h) {
  constexpr bool kRounds = !std::is_same_v<Format, Fp32>;
  const std::int64_t N = steps.states;
  const float *const Bm = steps.Bm, *const Cm = steps.Cm, *const rate = steps.rate;
  const Draw draw = Draw::of(steps.position);
  const auto state_at = [&](std::int64_t n) {
    const Vec decay = exp2_product(delta, Vec::load(rate + n * kMaxLanes));
    return fma(decay, Format::template load<Vec>(h + n * kMaxLanes), input * Vec::set(Bm[n]));
  };
  const auto take = [&](std::int64_t n, Vec state) {
    sum = fma(state, Vec::set(Cm[n]), sum);
    if constexpr (kRounds) state = rounded_to_half<Vec>(state, drawn_at<Vec>(steps, 0, n, draw));
    Format::store(state, h + n * kMaxLanes);
  };
  std::int64_t n = 0;
  for (; n + 4 <= N; n += 4) {  // whose decays do not wait for one another
    const Vec a = state_at(n), b = state_at(n + 1), c = state_at(n + 2), d = state_at(n + 3);
    take(n, a), take(n + 1, b), take(n + 2, c), take(n + 3, d);
  }
  for (; n < N; ++n) take(n, state_at(n));
  return sum;
}

// A single step of mixer_codes: values go to scratch once.
template <typename Vec>
inline Vec mixer_code_step(const MixerSteps& steps, Vec delta, Vec input, Vec sum, std::int8_t* h, float* scales,
                           float* scratch) {
  constexpr std::int64_t L = Vec::kLanes;
  const std::int64_t N = steps.states;
  const float *const Bm = steps.Bm, *const Cm = steps.Cm, *const rate = steps.rate;
  const typename Vec::Bits magnitude = Vec::set_bits(0x7fffffffu);
  const Vec scale = Vec::load(scales);
  typename Vec::Bits most = Vec::set_bits(0);
  for (std::int64_t n = 0; n < N; ++n) {
    const Vec decay = exp2_product(delta, Vec::load(rate + n * kMaxLanes));
    const Vec state = fma(decay, Vec::load_codes(h + n * kMaxLanes) * scale, input * Vec::set(Bm[n]));
    sum = fma(state, Vec::set(Cm[n]), sum);
    most = Vec::larger(most, state.bits() & magnitude);
    state.store(scratch + n * L);
  }
  const Vec largest = Vec::of_bits(most), reciprocal = code_reciprocal(largest);
  const Draw draw = Draw::of(steps.position);
  for (std::int64_t n = 0; n < N; ++n) {
    const Vec state = Vec::load(scratch + n * L);
    rounded_to_code(state, reciprocal, drawn_at<Vec>(steps, 0, n, draw)).store_codes(h + n * kMaxLanes);
  }
  (largest / Vec::set(127.0f)).store(scales);
  return sum;
}

template <typename Vec, typename Format>
void mixer_scan(const MixerScanArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t L = Vec::kLanes;
  const std::int64_t T = args.time, E = args.channels, N = args.states, strips = strip_count(E);
  alignas(kScratchAlignmentBytes) float delta[kChunk * kMaxLanes], input[kChunk * kMaxLanes], y[kChunk * kMaxLanes];
  auto* const h = static_cast<typename Format::Stored*>(args.h) + b * strips * N * kMaxLanes;
  for (std::int64_t t0 = 0; t0 < T; t0 += kChunk) {
    const std::int64_t count = chunk_steps(t0, T), first = b * T + t0;
    for (std::int64_t e = begin; e < end; e += L) {
      const auto vector = Channels<Vec>::of(e, end);
      const Vec D = vector.load(args.D);
      const std::int64_t at = in_strips(e, 0, N);
      const MixerSteps steps = {count,
                                N,
                                args.position + t0,
                                delta,
                                input,
                                y,
                                args.Bm + first * args.bc_stride,
                                args.Cm + first * args.bc_stride,
                                args.bc_stride,
                                args.rate + at,
                                args.places ? args.places + at : nullptr,
                                args.drawn && t0 == 0 ? args.drawn + at : nullptr};
      if (count == 1) {
        const Vec x = vector.load(args.x + first * E), z = vector.load(args.z + first * E);
        const Vec step = softplus(vector.load(args.dt + first * E));
        Vec sum;
        if constexpr (std::is_same_v<Format, Int8>) {
          float* const scales = args.scales + b * strips * kMaxLanes + e;
          sum = mixer_code_step(steps, step, step * x, D * x, h + at, scales, args.scratch);
        } else {
          if (e % kMaxLanes == 0 && e + kMaxLanes < end) prefetch_next_strip(h + at, N);
          sum = mixer_step<Vec, Format>(steps, step, step * x, D * x, h + at);
        }
        vector.store(sum * (z * logistic(z)), args.y + first * E);
        continue;
      }
      for (std::int64_t s = 0; s < count; ++s) {
        const Vec x = vector.load(args.x + (first + s) * E);
        const Vec step = softplus(vector.load(args.dt + (first + s) * E));
        step.store(delta + s * L);
        (step * x).store(input + s * L);
        (D * x).store(y + s * L);
      }
      if constexpr (std::is_same_v<Format, Int8>) {
        mixer_codes<Vec>(steps, h + at, args.scales + b * strips * kMaxLanes + e, args.scratch);
      } else {
        std::int64_t n = 0;
        for (; n + 4 <= N; n += 4) mixer_states<Vec, Format, 4>(steps, n, h + at);
        for (; n < N; ++n) mixer_states<Vec, Format, 1>(steps, n, h + at);
      }
      for (std::int64_t s = 0; s < count; ++s) {
        const Vec z = vector.load(args.z + (first + s) * E);
        vector.store(Vec::load(y + s * L) * (z * logistic(z)), args.y + (first + s) * E);
      }
    }
  }
}

}  // namespace moss

#endif  // MOSS_KERNELS_MIXER_VECTOR_H_
