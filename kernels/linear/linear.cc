// SPDX-License-Identifier: Apache-2.0

#include "linear.h"

namespace moss {
namespace {

template <LinearInput input, WeightName weight>
constexpr KernelTable<LinearKernel> table() {
  KernelTable<LinearKernel> kernels;
#define MOSS_LINEAR_KERNEL(FLAG, INPUT, WEIGHT, NAME) \
  if (LinearInput::INPUT == input && WeightName::WEIGHT == weight) kernels.add(NAME);
#include "kernels.inc"
#undef MOSS_LINEAR_KERNEL
  return kernels;
}

// In the order of WeightName.
template <LinearInput input>
constexpr KernelTable<LinearKernel> kTables[] = {
    table<input, WeightName::int8>(),
    table<input, WeightName::int8_g32>(),
    table<input, WeightName::int4_g32>(),
    table<input, WeightName::int4_g128>(),
};

}  // namespace

KernelList<LinearKernel> linear_kernels(LinearInput input, WeightName weight) {
  const auto& tables = input == LinearInput::f32 ? kTables<LinearInput::f32> : kTables<LinearInput::int8_block>;
  return tables[static_cast<int>(weight)].list();
}

}  // namespace moss
