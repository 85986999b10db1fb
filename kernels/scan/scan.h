// SPDX-License-Identifier: Apache-2.0
//
// The selective scan, forward and backward.
//
//     delta_t[e] = softplus(dt_t[e]) = log(1 + exp(dt_t[e]))
//     h_t[e,n]   = exp(delta_t[e] A[e,n]) h_{t-1}[e,n] + delta_t[e] x_t[e] Bm_t[n]
//     y_t[e]     = sum_n h_t[e,n] Cm_t[n] + D[e] x_t[e]
//
// B batch, T time, E channels (d_inner), N states (d_state). All arrays are contiguous and row-major. A <= 0.
//
// The unit of work is one sequence and one tile of channels (tile.h). dBm and dCm are summed over tiles, dA and dD over
// the batch, by the caller, from the parts that the units write. Kernels are stateless, allocate nothing and start no
// thread.
//
// Inference is the same forward without checkpoints, for a prompt of any length or, with T = 1, for a single step. hT
// may be h0, which is then brought up to date in place. Sequence and steps give the same y and state, to the bit.
//
// The forward keeps h before every chunk of kChunk steps (`checkpoints`); the backward recomputes the steps between.

#ifndef MOSS_KERNELS_SCAN_SCAN_H_
#define MOSS_KERNELS_SCAN_SCAN_H_

#include <cstddef>
#include <cstdint>

#include "../cpu.h"
#include "../tile.h"

namespace moss {

struct ScanShape {
  std::int64_t batch;     // B
  std::int64_t time;      // T
  std::int64_t channels;  // E
  std::int64_t states;    // N
};

template <typename Real>
struct ScanForward {
  ScanShape shape;
  const Real* x;      // [B, T, E]
  const Real* dt;     // [B, T, E], before softplus
  const Real* A;      // [E, N]
  const Real* Bm;     // [B, T, N]
  const Real* Cm;     // [B, T, N]
  const Real* D;      // [E]
  const Real* h0;     // [B, E, N]; null: zeros
  Real* y;            // [B, T, E]
  Real* hT;           // [B, E, N]; may be h0
  Real* checkpoints;  // [B, chunks, N, E] (channels last: a vector of them is stored at once); null: not kept
};

template <typename Real>
struct ScanBackward {
  ScanShape shape;
  const Real* x;            // the inputs of the forward
  const Real* dt;
  const Real* A;
  const Real* Bm;
  const Real* Cm;
  const Real* D;
  const Real* checkpoints;  // [B, chunks, N, E], as the forward wrote them
  const Real* dy;           // [B, T, E]
  const Real* dhT;          // [B, E, N]; null: zeros
  Real* dx;                 // [B, T, E]
  Real* ddt;                // [B, T, E]
  Real* dh0;                // [B, E, N]
  Real* dBm_parts;          // [tiles, B, T, N]
  Real* dCm_parts;          // [tiles, B, T, N]
  Real* dA_parts;           // [B, E, N]
  Real* dD_parts;           // [B, E]
};

template <typename Real>
struct ScanKernel {
  CpuFlag flag;
  const char* name;
  // One unit of work: sequence `b` in [0, B), tile `tile` in [0, tiles). `scratch` holds scan_scratch_size(N) elements,
  // aligned to kScratchAlignmentBytes; nothing in it is read before it is written.
  void (*forward)(const ScanForward<Real>& args, std::int64_t b, std::int64_t tile, Real* scratch);
  void (*backward)(const ScanBackward<Real>& args, std::int64_t b, std::int64_t tile, Real* scratch);
};

// Elements of scratch for N states, enough for every kernel, forward and backward.
constexpr std::size_t scan_scratch_size(std::int64_t states) {
  return static_cast<std::size_t>(kTile * (3 * states + 1) + kMaxLanes * 13 * kChunk);
}

// The kernels compiled in for `Real` (float, double), best first, the scalar one last.
template <typename Real>
KernelList<ScanKernel<Real>> scan_kernels();

#define MOSS_SCAN_KERNEL(FLAG, REAL, NAME) extern const ScanKernel<REAL> NAME;
#include "kernels.inc"
#undef MOSS_SCAN_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_SCAN_SCAN_H_
