// SPDX-License-Identifier: Apache-2.0
//
// The gate of a SwiGLU expert (Shazeer 2020): y = a / (1 + exp(-a)) * b, element by element.
//
// All arrays are contiguous; y may be a or b. The unit of work is the whole of the arguments, which the caller may cut
// anywhere. Kernels are stateless, allocate nothing and start no thread.

#ifndef MOSS_KERNELS_SWIGLU_SWIGLU_H_
#define MOSS_KERNELS_SWIGLU_SWIGLU_H_

#include <cstdint>

#include "../cpu.h"

namespace moss {

struct SwigluArgs {
  std::int64_t size;
  const float* a;  // [size]
  const float* b;  // [size]
  float* y;        // [size]
};

struct SwigluKernel {
  CpuFlag flag;
  const char* name;
  void (*run)(const SwigluArgs& args);
};

// The kernels compiled in, best first, the scalar one last.
KernelList<SwigluKernel> swiglu_kernels();

#define MOSS_SWIGLU_KERNEL(FLAG, NAME) extern const SwigluKernel NAME;
#include "kernels.inc"
#undef MOSS_SWIGLU_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_SWIGLU_SWIGLU_H_
