// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx512.h"
#include "vector.h"

namespace moss {

const SwigluKernel moss_swiglu_f32_avx512 = {kAvx512, "moss_swiglu_f32_avx512", swiglu<Vec16>};

}  // namespace moss
