// SPDX-License-Identifier: Apache-2.0

#include "mixer.h"

namespace moss {
namespace {

constexpr KernelTable<MixerKernel> table() {
  KernelTable<MixerKernel> kernels;
#define MOSS_MIXER_KERNEL(FLAG, NAME) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_MIXER_KERNEL
  return kernels;
}

constexpr KernelTable<MixerKernel> kTable = table();

}  // namespace

KernelList<MixerKernel> mixer_kernels() { return kTable.list(); }

}  // namespace moss
