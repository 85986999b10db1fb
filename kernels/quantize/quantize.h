// SPDX-License-Identifier: Apache-2.0
//
// The input of a linear layer in int8, dynamically: symmetric codes with a scale for each row and block of columns.
//
//     a[m, b]     = max |x[m, k]| over the columns k of block b
//     code[m, k]  = round(x[m, k] * (127 / a[m, b])), ties to even
//     scale[m, b] = a[m, b] / 127                                       value = code * scale
//     sum[m, b]   = sum of the codes of block b: what linear kernels whose weights carry an offset subtract it with
//
// Every operation is in fp32 and rounded once, so codes and scales are the same on every machine and for every kernel.
// In a block of zeros, and where 127 / a overflows (a below 4e-37), the codes are 0; so are they where a is not finite,
// and the scale, infinity or NaN, then makes every product with the block NaN.
//
// M rows (batch and time together), K columns, B columns in a block (at least 1), C = ceil(K / B) B columns with
// padding, whose codes are 0. All arrays are contiguous and row-major.
//
// The unit of work is the whole of the arguments; rows share nothing, so the caller may cut them anywhere. Kernels are
// stateless, allocate nothing and start no thread.

#ifndef MOSS_KERNELS_QUANTIZE_QUANTIZE_H_
#define MOSS_KERNELS_QUANTIZE_QUANTIZE_H_

#include <cstdint>

#include "../cpu.h"

namespace moss {

struct QuantizeArgs {
  std::int64_t rows;     // M
  std::int64_t columns;  // K
  std::int64_t block;    // B
  const float* x;        // [M, K]
  std::int8_t* codes;    // [M, C], each in -127 .. 127
  float* scales;         // [M, C / B]
  std::int32_t* sums;    // [M, C / B]
};

struct QuantizeKernel {
  CpuFlag flag;
  const char* name;
  void (*run)(const QuantizeArgs& args);
};

// The kernels compiled in, best first, the scalar one last.
KernelList<QuantizeKernel> quantize_kernels();

#define MOSS_QUANTIZE_KERNEL(FLAG, NAME) extern const QuantizeKernel NAME;
#include "kernels.inc"
#undef MOSS_QUANTIZE_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_QUANTIZE_QUANTIZE_H_
