// SPDX-License-Identifier: Apache-2.0

#include "quantize.h"

namespace moss {
namespace {

constexpr KernelTable<QuantizeKernel> table() {
  KernelTable<QuantizeKernel> kernels;
#define MOSS_QUANTIZE_KERNEL(FLAG, NAME) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_QUANTIZE_KERNEL
  return kernels;
}

constexpr KernelTable<QuantizeKernel> kTable = table();

}  // namespace

KernelList<QuantizeKernel> quantize_kernels() { return kTable.list(); }

}  // namespace moss
