// SPDX-License-Identifier: Apache-2.0

#include "dense.h"

namespace moss {
namespace {

constexpr KernelTable<DenseKernel> table() {
  KernelTable<DenseKernel> kernels;
#define MOSS_DENSE_KERNEL(FLAG, NAME) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_DENSE_KERNEL
  return kernels;
}

constexpr KernelTable<DenseKernel> kTable = table();

}  // namespace

KernelList<DenseKernel> dense_kernels() { return kTable.list(); }

}  // namespace moss
