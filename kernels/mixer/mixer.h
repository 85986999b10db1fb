// SPDX-License-Identifier: Apache-2.0
//
// The recurrent parts of a Mamba mixer at inference, channels last: the convolution, and the scan with its gate.
//
//     conv   p_t[e] = bias[e] + sum_w weight[w,e] x_{t-(W-1)+w}[e];    y_t[e] = p_t[e] / (1 + exp(-p_t[e]))
//     scan   delta_t[e] = softplus(dt_t[e])
//            h_t[n,e]   = exp(delta_t[e] A[n,e]) h_{t-1}[n,e] + delta_t[e] x_t[e] Bm_t[n]
//            y_t[e]     = (sum_n h_t[n,e] Cm_t[n] + D[e] x_t[e]) z_t[e] / (1 + exp(-z_t[e]))
//
// B sequences, T time, E channels (d_inner), N states (d_state), W conv width. They differ from conv/conv.h and
// scan/scan.h, which models train with, in how weights and states lie: neighbouring channels are neighbours in memory,
// so that a single step loads vectors and transposes nothing. What has a value for each channel and state lies in
// strips of kMaxLanes channels, [strips, N, kMaxLanes], so that a step reads it from one end to the other; the last
// strip is filled up with zeros. `rate` is A log2(e), computed once. Rows of Bm and Cm have a stride of their own, so
// that they may lie in a matrix with other columns.
//
// A state is carried in one of three formats, and rounded to it after each token, whose y is computed before: fp32;
// fp16; int8, codes with a scale a channel (rounding.h). Windows are fp32.
//
// State and window are brought up to date in place. Sequences may be given in pieces of any length, down to single
// steps: the same bits. The unit of work is one sequence and the channels begin .. end - 1, begin a multiple of
// kMaxLanes. Kernels are stateless, allocate nothing and start no thread.

#ifndef MOSS_KERNELS_MIXER_MIXER_H_
#define MOSS_KERNELS_MIXER_MIXER_H_

#include <cstdint>

#include "../cpu.h"
#include "../tile.h"

namespace moss {

// Strips of so many channels, and where the value of channel e and state n lies among them.
static constexpr std::int64_t strip_count(std::int64_t channels) { return (channels + kMaxLanes - 1) / kMaxLanes; }
static constexpr std::int64_t in_strips(std::int64_t e, std::int64_t n, std::int64_t states) {
  return (e / kMaxLanes * states + n) * kMaxLanes + e % kMaxLanes;
}

// Formats of states, called as in recipes.
enum class StateName { fp32, fp16, int8 };

struct StateFormat {
  const char* name;
  std::int64_t bytes;  // of a value
};
inline constexpr StateFormat kStateFormats[] = {{"fp32", 4}, {"fp16", 2}, {"int8", 1}};

struct MixerConvArgs {
  std::int64_t time;      // T
  std::int64_t channels;  // E
  std::int64_t width;     // W
  const float* x;         // [B, T, E]
  const float* weight;    // [W, E]
  const float* bias;      // [E]
  float* window;          // [B, W-1, E], oldest first
  float* y;               // [B, T, E]; not x
};

struct MixerScanArgs {
  std::int64_t time;       // T
  std::int64_t channels;   // E
  std::int64_t states;     // N
  const float* x;          // [B, T, E]
  const float* dt;         // [B, T, E]
  const float* z;          // [B, T, E]
  const float* rate;       // [strips, N, kMaxLanes]
  const float* Bm;         // [B, T] rows of N
  const float* Cm;         // [B, T] rows of N
  std::int64_t bc_stride;  // from one row of Bm, or Cm, to the next
  const float* D;          // [E]
  void* h;                 // [B, strips, N, kMaxLanes]: float, bits of fp16, or int8
  float* y;                // [B, T, E]; may be x, dt or z

  // Of states that are rounded.
  std::int64_t position = 0;              // tokens since the state began
  const std::uint32_t* places = nullptr;  // [strips, N, kMaxLanes]: state_places
  const std::uint32_t* drawn = nullptr;   // of the first step, like places: draw; null: it is computed
  float* scales = nullptr;                // int8: [B, strips, kMaxLanes]
  float* scratch = nullptr;               // int8: [N, kMaxLanes], of this unit alone
};

// What rounding hashes channels and states to.
void state_places(std::int64_t channels, std::int64_t states, std::uint32_t* places);

struct MixerKernel {
  CpuFlag flag;
  const char* name;
  void (*conv)(const MixerConvArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
  // The hash by which a token is rounded: the same for all layers and sequences, so that it is worth being kept for a
  // step. places, drawn: [count], a multiple of kMaxLanes.
  void (*draw)(const std::uint32_t* places, std::int64_t count, std::int64_t token, std::uint32_t* drawn);
  // By StateName.
  void (*scan[3])(const MixerScanArgs& args, std::int64_t b, std::int64_t begin, std::int64_t end);
};

// The kernels compiled in, best first, the scalar one last.
KernelList<MixerKernel> mixer_kernels();

#define MOSS_MIXER_KERNEL(FLAG, NAME) extern const MixerKernel NAME;
#include "kernels.inc"
#undef MOSS_MIXER_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_MIXER_MIXER_H_
