// SPDX-License-Identifier: Apache-2.0

#include "swiglu.h"

namespace moss {
namespace {

constexpr KernelTable<SwigluKernel> table() {
  KernelTable<SwigluKernel> kernels;
#define MOSS_SWIGLU_KERNEL(FLAG, NAME) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_SWIGLU_KERNEL
  return kernels;
}

constexpr KernelTable<SwigluKernel> kTable = table();

}  // namespace

KernelList<SwigluKernel> swiglu_kernels() { return kTable.list(); }

}  // namespace moss
