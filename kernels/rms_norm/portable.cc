// SPDX-License-Identifier: Apache-2.0

#include "../vec/portable.h"
#include "vector.h"

namespace moss {

const RmsNormKernel<float> moss_rms_norm_f32_portable = {kBaseline, "moss_rms_norm_f32_portable", rms_norm<Vec4>};

}  // namespace moss
