// SPDX-License-Identifier: Apache-2.0

#include "mixer.h"

#include "rounding.h"

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

void state_places(std::int64_t channels, std::int64_t states, std::uint32_t* places) {
  for (std::int64_t e = 0; e < strip_count(channels) * kMaxLanes; ++e) {
    for (std::int64_t n = 0; n < states; ++n) places[in_strips(e, n, states)] = place_of(e, n);
  }
}

KernelList<MixerKernel> mixer_kernels() { return kTable.list(); }

}  // namespace moss
