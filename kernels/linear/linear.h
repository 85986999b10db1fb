// SPDX-License-Identifier: Apache-2.0
//
// The linear layer with weights in 8 or 4 bits.
//
//     y[m, n] = sum_k x[m, k] w[n, k] + bias[n],    w[n, k] = code[n, k] * scale[n, k / G]
//
// M rows of input (tokens of all sequences together: one, or many), K columns (at least 1), N outputs. W [N, K] is
// packed as in packed.h, which also says what a format is and what a block of B columns is.
//
// The sum goes block by block. Of block b it takes
//
//     f32         s_b = sum_{k in b} x[m, k] code[n, k]                         in fp32, in the order of k
//     int8_block  s_b = (sum_{k in b} q[m, k] code[n, k]) * x_scale[m, b]       inner sum in int32
//
// with x given in fp32, or as the codes q and scales of quantize/quantize.h in blocks of the same B. The inner sum is
// exact, as fp32 too: it is at most 127 * 127 * 32 or 127 * 8 * 128, both less than 2^24. Then, in the order of b,
//
//     y = sum_b s_b * scale[n, b]    or    y = (sum_b s_b) * scale[n]    where a row has one scale,
//
// and the bias last. Sums and products are in fp32, each rounded once in the scalar form. A fast form has the same
// integers; it may fuse, and add up in another order.
//
// All arrays are contiguous and row-major. The unit of work is all rows and one tile of outputs (tile.h), which no
// other unit writes; rows may be cut anywhere by moving x and y. Neither changes a bit of the result. Kernels are
// stateless, allocate nothing and start no thread.

#ifndef MOSS_KERNELS_LINEAR_LINEAR_H_
#define MOSS_KERNELS_LINEAR_LINEAR_H_

#include <cstdint>

#include "../cpu.h"
#include "../tile.h"
#include "packed.h"

namespace moss {

// What the input is given as; spelled as in recipes.
enum class LinearInput { f32, int8_block };

inline constexpr const char* kLinearInputs[] = {"f32", "int8_block"};

struct LinearShape {
  std::int64_t rows;     // M
  std::int64_t columns;  // K
  std::int64_t outputs;  // N
};

struct LinearArgs {
  LinearShape shape;
  const float* x;              // [M, K]; f32 kernels alone read it
  const std::int8_t* x_codes;  // [M, blocks, B]; int8_block kernels alone read it and the scales
  const float* x_scales;       // [M, blocks]
  const std::uint8_t* weight;  // [N, row_bytes]
  const float* bias;           // [N]; null: none
  float* y;                    // [M, N]
};

struct LinearKernel {
  CpuFlag flag;
  const char* name;
  // One unit of work: tile `tile` in [0, tile_count(N)) of the outputs.
  void (*run)(const LinearArgs& args, std::int64_t tile);
};

// The kernels compiled in for an input and a weight format, best first, the scalar one last.
KernelList<LinearKernel> linear_kernels(LinearInput input, WeightName weight);

#define MOSS_LINEAR_KERNEL(FLAG, INPUT, WEIGHT, NAME) extern const LinearKernel NAME;
#include "kernels.inc"
#undef MOSS_LINEAR_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_LINEAR_H_
