// SPDX-License-Identifier: Apache-2.0
//
// The linear layer with weights in fp32: routers, and what is kept in full precision.
//
//     y[m, n] = sum_k x[m, k] w[n, k] + bias[n]
//
// M rows, K columns (at least 1), N outputs. All arrays are contiguous and row-major. Sums are in fp32, in an order that
// depends on the kernel and on K alone. The unit of work is all rows and the outputs begin .. end - 1; neither cutting
// those nor the rows changes a bit. Kernels are stateless, allocate nothing and start no thread.

#ifndef MOSS_KERNELS_DENSE_DENSE_H_
#define MOSS_KERNELS_DENSE_DENSE_H_

#include <cstdint>

#include "../cpu.h"

namespace moss {

struct DenseArgs {
  std::int64_t rows;     // M
  std::int64_t columns;  // K
  std::int64_t outputs;  // N
  const float* x;        // [M, K]
  const float* weight;   // [N, K]
  const float* bias;     // [N]; null: none
  float* y;              // [M, N]
};

struct DenseKernel {
  CpuFlag flag;
  const char* name;
  void (*run)(const DenseArgs& args, std::int64_t begin, std::int64_t end);
};

// The kernels compiled in, best first, the scalar one last.
KernelList<DenseKernel> dense_kernels();

#define MOSS_DENSE_KERNEL(FLAG, NAME) extern const DenseKernel NAME;
#include "kernels.inc"
#undef MOSS_DENSE_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_DENSE_DENSE_H_
