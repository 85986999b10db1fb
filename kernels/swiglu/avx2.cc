// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx2.h"
#include "vector.h"

namespace moss {

const SwigluKernel moss_swiglu_f32_avx2 = {kAvx2, "moss_swiglu_f32_avx2", swiglu<Vec8>};

}  // namespace moss
