// SPDX-License-Identifier: Apache-2.0

#include "scan.h"

namespace moss {
namespace {

template <typename Real>
constexpr KernelTable<ScanKernel<Real>> table() {
  KernelTable<ScanKernel<Real>> kernels;
#define MOSS_SCAN_KERNEL(FLAG, REAL, NAME) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_SCAN_KERNEL
  return kernels;
}

template <typename Real>
constexpr KernelTable<ScanKernel<Real>> kTable = table<Real>();

}  // namespace

template <>
KernelList<ScanKernel<float>> scan_kernels<float>() {
  return kTable<float>.list();
}

template <>
KernelList<ScanKernel<double>> scan_kernels<double>() {
  return kTable<double>.list();
}

}  // namespace moss
