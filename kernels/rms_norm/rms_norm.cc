// SPDX-License-Identifier: Apache-2.0

#include "rms_norm.h"

namespace moss {
namespace {

template <typename Real>
constexpr KernelTable<RmsNormKernel<Real>> table() {
  KernelTable<RmsNormKernel<Real>> kernels;
#define MOSS_RMS_NORM_KERNEL(FLAG, REAL, NAME) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_RMS_NORM_KERNEL
  return kernels;
}

template <typename Real>
constexpr KernelTable<RmsNormKernel<Real>> kTable = table<Real>();

}  // namespace

template <>
KernelList<RmsNormKernel<float>> rms_norm_kernels<float>() {
  return kTable<float>.list();
}

template <>
KernelList<RmsNormKernel<double>> rms_norm_kernels<double>() {
  return kTable<double>.list();
}

}  // namespace moss
