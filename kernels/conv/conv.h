// SPDX-License-Identifier: Apache-2.0
//
// The causal depthwise convolution followed by SiLU, forward and backward.
//
//     p_t[e] = bias[e] + sum_w weight[e,w] x_{t-(W-1)+w}[e]
//     y_t[e] = p_t[e] / (1 + exp(-p_t[e]))
//
// B batch, T time, E channels (d_inner), W conv width (at least 1). The inputs before the first step come from `window`
// [B, E, W-1], oldest first: x_{-k} = window[W-1-k]. The new window holds the last W-1 inputs of the two together, so
// that a sequence may be given in pieces of any length, down to single steps (T = 1): y and window are the same to the
// bit. new_window may be window, which is then brought up to date in place. All arrays are contiguous and row-major.
//
// The unit of work is one sequence and one tile of channels (tile.h). Kernels are stateless, allocate nothing and start
// no thread.

#ifndef MOSS_KERNELS_CONV_CONV_H_
#define MOSS_KERNELS_CONV_CONV_H_

#include <cstddef>
#include <cstdint>

#include "../cpu.h"
#include "../tile.h"

namespace moss {

struct ConvShape {
  std::int64_t batch;     // B
  std::int64_t time;      // T
  std::int64_t channels;  // E
  std::int64_t width;     // W
};

template <typename Real>
struct ConvForward {
  ConvShape shape;
  const Real* x;       // [B, T, E]
  const Real* weight;  // [E, W]
  const Real* bias;    // [E]
  const Real* window;  // [B, E, W-1]; null: zeros
  Real* y;             // [B, T, E]
  Real* new_window;    // [B, E, W-1]; may be window
};

template <typename Real>
struct ConvBackward {
  ConvShape shape;
  const Real* x;  // the inputs of the forward
  const Real* weight;
  const Real* bias;
  const Real* window;
  const Real* dy;           // [B, T, E]
  const Real* dnew_window;  // [B, E, W-1]; null: zeros
  Real* dx;                 // [B, T, E]
  Real* dwindow;            // [B, E, W-1]
  Real* dweight_parts;      // [B, E, W]
  Real* dbias_parts;        // [B, E]
};

template <typename Real>
struct ConvKernel {
  CpuFlag flag;
  const char* name;
  // One unit of work: sequence `b` in [0, B), tile `tile` in [0, tiles). `scratch` holds conv_scratch_size(W) elements,
  // aligned to kScratchAlignmentBytes; nothing in it is read before it is written.
  void (*forward)(const ConvForward<Real>& args, std::int64_t b, std::int64_t tile, Real* scratch);
  void (*backward)(const ConvBackward<Real>& args, std::int64_t b, std::int64_t tile, Real* scratch);
};

// Elements of scratch for width W, enough for every kernel, forward and backward.
constexpr std::size_t conv_scratch_size(std::int64_t width) {
  return static_cast<std::size_t>(kTile * (5 * width + 2 * kChunk));
}

// The kernels compiled in for `Real` (float, double), best first, the scalar one last.
template <typename Real>
KernelList<ConvKernel<Real>> conv_kernels();

#define MOSS_CONV_KERNEL(FLAG, REAL, NAME) extern const ConvKernel<REAL> NAME;
#include "kernels.inc"
#undef MOSS_CONV_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_CONV_CONV_H_
