// SPDX-License-Identifier: Apache-2.0
//
// The linear layer with weights in 8 or 4 bits.
//
//     y[m, n] = sum_k x[m, k] w[n, k] + bias[n],    w[n, k] = code[n, k] * scale[n, k / G]
//
// M rows of input (tokens of all sequences together: one, or many), K columns (at least 1), N outputs. What a number
// format is, and what a block of B columns: format.h. W [N, K] is packed as in layout.h, in the layout of the kernel.
//
// The sum goes block by block. Of block b it takes
//
//     f32         s_b = sum_{k in b} x[m, k] code[n, k]                         in fp32, in the order of k
//     int8_block  s_b = (sum_{k in b} q[m, k] code[n, k]) * x_scale[m, b]       inner sum in int32
//
// with x given in fp32, or as the codes q, scales and sums of quantize/quantize.h in blocks of the same B. The inner sum
// is exact, as fp32 too: it is at most 127 * 127 * 32 or 127 * 8 * 128, both less than 2^24. Then, in the order of b,
//
//     y = sum_b s_b * scale[n, b]    or    y = (sum_b s_b) * scale[n]    where a row has one scale,
//
// and the bias last. Sums and products are in fp32, each rounded once in the scalar form. A fast form has the same
// integers; it may fuse, and add up in another order.
//
// All arrays are contiguous and row-major, at any address. The unit of work is all rows and a range of outputs that
// begins at a strip; rows may be cut anywhere by moving x and y. Neither changes a bit of the result. Kernels are
// stateless, allocate nothing and start no thread.

#ifndef MOSS_KERNELS_LINEAR_LINEAR_H_
#define MOSS_KERNELS_LINEAR_LINEAR_H_

#include <cstdint>

#include "../cpu.h"
#include "layout.h"

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
  const std::int8_t* x_codes;  // [M, blocks, B]; int8_block kernels alone read it, the scales and the sums
  const float* x_scales;       // [M, blocks]
  const std::int32_t* x_sums;  // [M, blocks]
  const std::uint8_t* weight;  // packed_bytes
  const float* bias;           // [N]; null: none
  float* y;                    // [M, N]
};

struct LinearKernel {
  CpuFlag flag;
  const char* name;
  const LinearLayout* layout;
  // One unit of work: outputs begin .. end - 1 of N; begin is a multiple of layout->strip.
  void (*run)(const LinearArgs& args, std::int64_t begin, std::int64_t end);
};

// The kernels compiled in for an input and a weight format, best first, the scalar one last.
KernelList<LinearKernel> linear_kernels(LinearInput input, WeightName weight);

#define MOSS_LINEAR_KERNEL(FLAG, INPUT, WEIGHT, NAME) extern const LinearKernel NAME;
#include "kernels.inc"
#undef MOSS_LINEAR_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_LINEAR_H_
