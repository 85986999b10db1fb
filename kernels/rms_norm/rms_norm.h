// SPDX-License-Identifier: Apache-2.0
//
// RMSNorm (Zhang & Sennrich 2019).
//
//     y[m, d] = x[m, d] / sqrt(1/D sum_d x[m, d]^2 + eps) * weight[d]
//
// M rows (batch and time together), D columns (d_model, at least 1). All arrays are contiguous and row-major. y may be
// x. Where the sum of squares overflows (in fp32 at values of 1e19 / sqrt(D)) y is 0.
//
// The unit of work is the whole of the arguments; rows share nothing, so the caller may cut them anywhere. Kernels are
// stateless, allocate nothing and start no thread.

#ifndef MOSS_KERNELS_RMS_NORM_RMS_NORM_H_
#define MOSS_KERNELS_RMS_NORM_RMS_NORM_H_

#include <cstdint>

#include "../cpu.h"

namespace moss {

template <typename Real>
struct RmsNormArgs {
  std::int64_t rows;     // M
  std::int64_t columns;  // D
  const Real* x;         // [M, D]
  const Real* weight;    // [D]
  Real eps;              // positive
  Real* y;               // [M, D]
};

template <typename Real>
struct RmsNormKernel {
  CpuFlag flag;
  const char* name;
  void (*run)(const RmsNormArgs<Real>& args);
};

// The kernels compiled in for `Real` (float, double), best first, the scalar one last.
template <typename Real>
KernelList<RmsNormKernel<Real>> rms_norm_kernels();

#define MOSS_RMS_NORM_KERNEL(FLAG, REAL, NAME) extern const RmsNormKernel<REAL> NAME;
#include "kernels.inc"
#undef MOSS_RMS_NORM_KERNEL

}  // namespace moss

#endif  // MOSS_KERNELS_RMS_NORM_RMS_NORM_H_
