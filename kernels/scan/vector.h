// SPDX-License-Identifier: Apache-2.0
//
// The scan on vectors of neighbouring channels, a template on the vector type. Formula and shapes: scan.h.
//
// A tile of channels goes through time a chunk of steps at a time, one vector of channels after the other. Within it
// the states are taken a few at a time (kStates), which stay in registers over the chunk's steps; what does not depend
// on the state (delta, its product with x) is computed first, once a step. The backward takes the chunks last to first:
// it repeats a chunk's steps from the checkpoint, keeping each step's decay and the state before it, and walks back
// over them.

#ifndef MOSS_KERNELS_SCAN_VECTOR_H_
#define MOSS_KERNELS_SCAN_VECTOR_H_

#include "../vec/channels.h"
#include "../vec/math.h"
#include "scan.h"

namespace moss {

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// Calls run(Count<k>(), n) for groups of k states that begin at n, which together are 0 .. N.
template <typename Run>
inline void for_states(std::int64_t N, const Run& run) {
  std::int64_t n = 0;
  for (; n + 4 <= N; n += 4) run(Count<4>(), n);
  for (; n < N; ++n) run(Count<1>(), n);
}

// kStates states of one vector through the steps of a chunk. A, h: [kStates, kTile], A times log2(e); Bm, Cm: rows of
// N; delta, input (delta x), y: [steps, lanes], y is added to.
template <typename Vec, int kStates>
inline void forward_states(std::int64_t steps, std::int64_t N, const float* A, const float* Bm, const float* Cm,
                           const float* delta, const float* input, float* h, float* y) {
  Vec state[kStates], rate[kStates];
  for (int j = 0; j < kStates; ++j) {
    state[j] = Vec::load(h + j * kTile);
    rate[j] = Vec::load(A + j * kTile);
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    const std::int64_t at = s * Vec::kLanes;
    const Vec step_delta = Vec::load(delta + at), step_input = Vec::load(input + at);
    Vec sum = Vec::load(y + at);
    for (int j = 0; j < kStates; ++j) {
      const Vec decay = exp2_product(step_delta, rate[j]);
      state[j] = fma(decay, state[j], step_input * Vec::set(Bm[s * N + j]));
      sum = fma(state[j], Vec::set(Cm[s * N + j]), sum);
    }
    sum.store(y + at);
  }
  for (int j = 0; j < kStates; ++j) state[j].store(h + j * kTile);
}

template <typename Vec>
void scan_forward(const ScanForward<float>& args, std::int64_t b, std::int64_t tile, float* scratch) {
  constexpr std::int64_t L = Vec::kLanes;
  const std::int64_t T = args.shape.time, E = args.shape.channels, N = args.shape.states;
  const std::int64_t begin = tile_begin(tile), channels = tile_end(tile, E) - begin;
  float* const A = scratch;                 // [N, kTile], times log2(e)
  float* const h = A + N * kTile;           // [N, kTile]
  float* const delta = h + N * kTile;       // [kChunk, L]
  float* const input = delta + kChunk * L;  // [kChunk, L], delta x
  float* const y = input + kChunk * L;      // [kChunk, L]
  transpose_in(args.A + begin * N, channels, N, kLog2E, A);
  transpose_in(args.h0 ? args.h0 + (b * E + begin) * N : nullptr, channels, N, 1.0f, h);

  for (std::int64_t chunk = 0; chunk < chunk_count(T); ++chunk) {
    const std::int64_t t0 = chunk * kChunk, steps = chunk_steps(t0, T);
    const float* const Bm = args.Bm + (b * T + t0) * N;
    const float* const Cm = args.Cm + (b * T + t0) * N;
    for (std::int64_t c = 0; c < channels; c += L) {
      const auto vector = Channels<Vec>::of(c, channels);
      if (args.checkpoints) {
        float* const checkpoint = args.checkpoints + (b * chunk_count(T) + chunk) * N * E + begin;
        for (std::int64_t n = 0; n < N; ++n) vector.store(Vec::load(h + n * kTile + c), checkpoint + n * E);
      }
      const Vec D = vector.load(args.D + begin);
      for (std::int64_t s = 0; s < steps; ++s) {
        const std::int64_t row = (b * T + t0 + s) * E + begin;
        const Vec x = vector.load(args.x + row);
        const Vec step = softplus(vector.load(args.dt + row));
        step.store(delta + s * L);
        (step * x).store(input + s * L);
        (D * x).store(y + s * L);
      }
      for_states(N, [&](auto count, std::int64_t n) {
        const std::int64_t at = n * kTile + c;
        forward_states<Vec, count.value>(steps, N, A + at, Bm + n, Cm + n, delta, input, h + at, y);
      });
      for (std::int64_t s = 0; s < steps; ++s) {
        vector.store(Vec::load(y + s * L), args.y + (b * T + t0 + s) * E + begin);
      }
    }
  }
  transpose_out(h, channels, N, args.hT + (b * E + begin) * N);
}

// What the backward has of a chunk for one vector of channels, each [kChunk, L].
struct ChunkRows {
  float* delta;
  float* input;    // delta x
  float* dy;
  float* d_input;  // gradient of delta x, added to
  float* d_delta;  // gradient of delta where it is in the exponent, times log2(e), added to
};

template <typename Vec>
inline void add_sums(const Vec (&terms)[4], float* sums) {
  add_sums(terms[0], terms[1], terms[2], terms[3], sums);
}

template <typename Vec>
inline void add_sums(const Vec (&terms)[1], float* sums) {
  *sums += sum(terms[0]);
}

// kStates states of one vector through the steps of a chunk, forward from the checkpoint and back. checkpoint: rows of
// E; A, dh, dA: [kStates, kTile], A times log2(e), dA added to; Bm, Cm, dBm, dCm: rows of N, the latter added to.
template <typename Vec, int kStates>
inline void backward_states(std::int64_t steps, std::int64_t N, std::int64_t E, Channels<Vec> vector,
                            const float* checkpoint, const float* A, const float* Bm, const float* Cm,
                            const ChunkRows& rows, float* kept, float* dh, float* dA, float* dBm, float* dCm) {
  constexpr std::int64_t L = Vec::kLanes;
  float* const kept_decay = kept;                         // [kChunk, kStates, L]
  float* const kept_state = kept + kChunk * kStates * L;  // [kChunk, kStates, L], before the step
  Vec state[kStates], rate[kStates], d_state[kStates], d_rate[kStates];
  for (int j = 0; j < kStates; ++j) {
    state[j] = vector.load(checkpoint + j * E);
    rate[j] = Vec::load(A + j * kTile);
    d_state[j] = Vec::load(dh + j * kTile);
    d_rate[j] = Vec::set(0.0f);
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    const Vec delta = Vec::load(rows.delta + s * L), input = Vec::load(rows.input + s * L);
    for (int j = 0; j < kStates; ++j) {
      const std::int64_t at = (s * kStates + j) * L;
      const Vec decay = exp2_product(delta, rate[j]);
      decay.store(kept_decay + at);
      state[j].store(kept_state + at);
      state[j] = fma(decay, state[j], input * Vec::set(Bm[s * N + j]));
    }
  }
  for (std::int64_t s = steps - 1; s >= 0; --s) {
    const Vec delta = Vec::load(rows.delta + s * L), input = Vec::load(rows.input + s * L);
    const Vec dy = Vec::load(rows.dy + s * L);
    Vec d_input = Vec::load(rows.d_input + s * L), d_delta = Vec::load(rows.d_delta + s * L);
    Vec b_terms[kStates], c_terms[kStates];
    for (int j = 0; j < kStates; ++j) {
      const std::int64_t at = (s * kStates + j) * L;
      const Vec g = fma(dy, Vec::set(Cm[s * N + j]), d_state[j]);  // gradient of the state after the step
      c_terms[j] = dy * state[j];
      b_terms[j] = g * input;
      d_input = fma(g, Vec::set(Bm[s * N + j]), d_input);
      d_state[j] = g * Vec::load(kept_decay + at);
      state[j] = Vec::load(kept_state + at);
      const Vec d_exponent = d_state[j] * state[j];
      d_delta = fma(d_exponent, rate[j], d_delta);
      d_rate[j] = fma(d_exponent, delta, d_rate[j]);
    }
    d_input.store(rows.d_input + s * L);
    d_delta.store(rows.d_delta + s * L);
    add_sums(b_terms, dBm + s * N);
    add_sums(c_terms, dCm + s * N);
  }
  for (int j = 0; j < kStates; ++j) {
    d_state[j].store(dh + j * kTile);
    (Vec::load(dA + j * kTile) + d_rate[j]).store(dA + j * kTile);
  }
}

template <typename Vec>
void scan_backward(const ScanBackward<float>& args, std::int64_t b, std::int64_t tile, float* scratch) {
  constexpr std::int64_t L = Vec::kLanes;
  const std::int64_t T = args.shape.time, E = args.shape.channels, N = args.shape.states;
  const std::int64_t begin = tile_begin(tile), channels = tile_end(tile, E) - begin;
  float* const A = scratch;          // [N, kTile], times log2(e)
  float* const dh = A + N * kTile;   // [N, kTile]
  float* const dA = dh + N * kTile;  // [N, kTile]
  float* const dD = dA + N * kTile;  // [kTile]
  float* const chunk_rows = dD + kTile;
  const ChunkRows rows = {chunk_rows, chunk_rows + kChunk * L, chunk_rows + 2 * kChunk * L,
                          chunk_rows + 3 * kChunk * L, chunk_rows + 4 * kChunk * L};
  float* const kept = chunk_rows + 5 * kChunk * L;  // [2, kChunk, 4, L]
  float* const dBm_part = args.dBm_parts + (tile * args.shape.batch + b) * T * N;
  float* const dCm_part = args.dCm_parts + (tile * args.shape.batch + b) * T * N;
  transpose_in(args.A + begin * N, channels, N, kLog2E, A);
  transpose_in(args.dhT ? args.dhT + (b * E + begin) * N : nullptr, channels, N, 1.0f, dh);
  set_zero(dA, N * kTile);
  set_zero(dD, kTile);
  set_zero(dBm_part, T * N);
  set_zero(dCm_part, T * N);

  for (std::int64_t chunk = chunk_count(T) - 1; chunk >= 0; --chunk) {
    const std::int64_t t0 = chunk * kChunk, steps = chunk_steps(t0, T);
    const float* const checkpoint = args.checkpoints + (b * chunk_count(T) + chunk) * N * E + begin;
    const float* const Bm = args.Bm + (b * T + t0) * N;
    const float* const Cm = args.Cm + (b * T + t0) * N;
    float* const dBm = dBm_part + t0 * N;
    float* const dCm = dCm_part + t0 * N;
    for (std::int64_t c = 0; c < channels; c += L) {
      const auto vector = Channels<Vec>::of(c, channels);
      for (std::int64_t s = 0; s < steps; ++s) {
        const std::int64_t row = (b * T + t0 + s) * E + begin;
        const Vec step = softplus(vector.load(args.dt + row));
        step.store(rows.delta + s * L);
        (step * vector.load(args.x + row)).store(rows.input + s * L);
        vector.load(args.dy + row).store(rows.dy + s * L);
      }
      set_zero(rows.d_input, steps * L);
      set_zero(rows.d_delta, steps * L);
      for_states(N, [&](auto count, std::int64_t n) {
        const std::int64_t at = n * kTile + c;
        backward_states<Vec, count.value>(steps, N, E, vector, checkpoint + n * E, A + at, Bm + n, Cm + n, rows, kept,
                                          dh + at, dA + at, dBm + n, dCm + n);
      });
      const Vec D = vector.load(args.D + begin);
      Vec sum_dD = Vec::load(dD + c);
      for (std::int64_t s = 0; s < steps; ++s) {
        const std::int64_t row = (b * T + t0 + s) * E + begin;
        const Vec x = vector.load(args.x + row), dy = Vec::load(rows.dy + s * L);
        const Vec d_input = Vec::load(rows.d_input + s * L);
        const Vec d_delta = fma(Vec::load(rows.d_delta + s * L), Vec::set(kLn2), d_input * x);
        vector.store(fma(d_input, Vec::load(rows.delta + s * L), D * dy), args.dx + row);
        vector.store(d_delta * logistic(vector.load(args.dt + row)), args.ddt + row);
        sum_dD = fma(dy, x, sum_dD);
      }
      sum_dD.store(dD + c);
    }
  }
  for (std::int64_t c = 0; c < channels; ++c) args.dD_parts[b * E + begin + c] = dD[c];
  transpose_out(dA, channels, N, args.dA_parts + (b * E + begin) * N);
  transpose_out(dh, channels, N, args.dh0 + (b * E + begin) * N);
}

}  // namespace moss

#endif  // MOSS_KERNELS_SCAN_VECTOR_H_
