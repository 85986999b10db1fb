// SPDX-License-Identifier: Apache-2.0

#include "scan.h"

#include <type_traits>

namespace moss {
namespace {

// The kernels of kernels.inc whose type is Real, in their order.
template <typename Real>
struct List {
  const ScanKernel<Real>* kernels[8] = {};
  std::size_t count = 0;

  template <typename Other>
  constexpr void add(const ScanKernel<Other>& kernel) {
    if constexpr (std::is_same_v<Real, Other>) kernels[count++] = &kernel;
  }

  constexpr List() {
#define MOSS_SCAN_KERNEL(FLAG, REAL, NAME) add(NAME);
#include "kernels.inc"
#undef MOSS_SCAN_KERNEL
  }
};

template <typename Real>
constexpr List<Real> kList;

}  // namespace

template <>
KernelList<ScanKernel<float>> scan_kernels<float>() {
  return {kList<float>.kernels, kList<float>.count};
}

template <>
KernelList<ScanKernel<double>> scan_kernels<double>() {
  return {kList<double>.kernels, kList<double>.count};
}

}  // namespace moss
