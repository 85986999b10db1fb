// SPDX-License-Identifier: Apache-2.0

#include "../vec/portable.h"
#include "vector.h"

namespace moss {

const SwigluKernel moss_swiglu_f32_portable = {kBaseline, "moss_swiglu_f32_portable", swiglu<Vec4>};

}  // namespace moss
