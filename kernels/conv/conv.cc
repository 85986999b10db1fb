// SPDX-License-Identifier: Apache-2.0

#include "conv.h"

namespace moss {
namespace {

template <typename Real>
constexpr KernelTable<ConvKernel<Real>> table() {
  KernelTable<ConvKernel<Real>> kernels;
#define MOSS_CONV_KERNEL(FLAG, REAL, NAME) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_CONV_KERNEL
  return kernels;
}

template <typename Real>
constexpr KernelTable<ConvKernel<Real>> kTable = table<Real>();

}  // namespace

template <>
KernelList<ConvKernel<float>> conv_kernels<float>() {
  return kTable<float>.list();
}

template <>
KernelList<ConvKernel<double>> conv_kernels<double>() {
  return kTable<double>.list();
}

}  // namespace moss
