// SPDX-License-Identifier: Apache-2.0
//
// The scan as it is defined, one channel and one state at a time: the reference of the vector forms, and the form for
// float64. Formula and shapes: scan.h.

#include <cmath>

#include "scan.h"

namespace moss {
namespace {

// softplus and its derivative (the logistic function) from one exp, without overflow or cancellation at either end.
template <typename Real>
Real softplus(Real dt, Real* slope) {
  const Real e = std::exp(-std::fabs(dt));
  *slope = (dt >= 0 ? Real(1) : e) / (1 + e);
  return (dt > 0 ? dt : Real(0)) + std::log1p(e);
}

template <typename Real>
void forward(const ScanForward<Real>& args, std::int64_t b, std::int64_t tile, Real* scratch) {
  const std::int64_t T = args.shape.time, E = args.shape.channels, N = args.shape.states;
  Real* const h = scratch;  // [N]
  for (std::int64_t e = tile_begin(tile); e < tile_end(tile, E); ++e) {
    const Real* const A = args.A + e * N;
    const std::int64_t state = (b * E + e) * N;
    for (std::int64_t n = 0; n < N; ++n) h[n] = args.h0 ? args.h0[state + n] : Real(0);
    for (std::int64_t t = 0; t < T; ++t) {
      if (args.checkpoints && t % kChunk == 0) {
        Real* const checkpoint = args.checkpoints + (b * chunk_count(T) + t / kChunk) * N * E + e;
        for (std::int64_t n = 0; n < N; ++n) checkpoint[n * E] = h[n];
      }
      const Real* const Bm = args.Bm + (b * T + t) * N;
      const Real* const Cm = args.Cm + (b * T + t) * N;
      const std::int64_t i = (b * T + t) * E + e;
      Real slope;
      const Real delta = softplus(args.dt[i], &slope);
      const Real input = delta * args.x[i];
      Real y = args.D[e] * args.x[i];
      for (std::int64_t n = 0; n < N; ++n) {
        h[n] = std::exp(delta * A[n]) * h[n] + input * Bm[n];
        y += h[n] * Cm[n];
      }
      args.y[i] = y;
    }
    for (std::int64_t n = 0; n < N; ++n) args.hT[state + n] = h[n];
  }
}

template <typename Real>
void backward(const ScanBackward<Real>& args, std::int64_t b, std::int64_t tile, Real* scratch) {
  const std::int64_t T = args.shape.time, E = args.shape.channels, N = args.shape.states;
  Real* const h = scratch;                    // [kChunk + 1, N], h[s] before step s of the chunk
  Real* const dh = h + (kChunk + 1) * N;  // [N], gradient of the state after the step at hand
  Real* const dBm = args.dBm_parts + (tile * args.shape.batch + b) * T * N;
  Real* const dCm = args.dCm_parts + (tile * args.shape.batch + b) * T * N;
  for (std::int64_t i = 0; i < T * N; ++i) dBm[i] = dCm[i] = Real(0);

  for (std::int64_t e = tile_begin(tile); e < tile_end(tile, E); ++e) {
    const Real* const A = args.A + e * N;
    const std::int64_t state = (b * E + e) * N;
    Real* const dA = args.dA_parts + state;
    Real dD = 0;
    for (std::int64_t n = 0; n < N; ++n) {
      dh[n] = args.dhT ? args.dhT[state + n] : Real(0);
      dA[n] = 0;
    }
    for (std::int64_t chunk = chunk_count(T) - 1; chunk >= 0; --chunk) {
      const std::int64_t t0 = chunk * kChunk;
      const std::int64_t steps = chunk_steps(t0, T);
      const Real* const checkpoint = args.checkpoints + (b * chunk_count(T) + chunk) * N * E + e;
      for (std::int64_t n = 0; n < N; ++n) h[n] = checkpoint[n * E];
      for (std::int64_t s = 0; s < steps; ++s) {
        const std::int64_t i = (b * T + t0 + s) * E + e;
        Real slope;
        const Real delta = softplus(args.dt[i], &slope);
        const Real* const Bm = args.Bm + (b * T + t0 + s) * N;
        for (std::int64_t n = 0; n < N; ++n) {
          h[(s + 1) * N + n] = std::exp(delta * A[n]) * h[s * N + n] + delta * args.x[i] * Bm[n];
        }
      }
      for (std::int64_t s = steps - 1; s >= 0; --s) {
        const std::int64_t t = t0 + s, i = (b * T + t) * E + e;
        const Real x = args.x[i], dy = args.dy[i];
        Real slope;
        const Real delta = softplus(args.dt[i], &slope);
        const Real* const Bm = args.Bm + (b * T + t) * N;
        const Real* const Cm = args.Cm + (b * T + t) * N;
        Real d_input = 0, d_delta = 0;  // of delta x, and of delta inside the exponent
        for (std::int64_t n = 0; n < N; ++n) {
          const Real g = dh[n] + dy * Cm[n];
          dCm[t * N + n] += dy * h[(s + 1) * N + n];
          dBm[t * N + n] += g * delta * x;
          d_input += g * Bm[n];
          dh[n] = g * std::exp(delta * A[n]);
          const Real d_exponent = dh[n] * h[s * N + n];
          d_delta += d_exponent * A[n];
          dA[n] += d_exponent * delta;
        }
        args.dx[i] = d_input * delta + args.D[e] * dy;
        args.ddt[i] = (d_delta + d_input * x) * slope;
        dD += dy * x;
      }
    }
    args.dD_parts[b * E + e] = dD;
    for (std::int64_t n = 0; n < N; ++n) args.dh0[state + n] = dh[n];
  }
}

}  // namespace

const ScanKernel<float> moss_scan_f32_scalar = {kBaseline, "moss_scan_f32_scalar", forward<float>, backward<float>};
const ScanKernel<double> moss_scan_f64_scalar = {kBaseline, "moss_scan_f64_scalar", forward<double>, backward<double>};

}  // namespace moss
