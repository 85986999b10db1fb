// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx2.h"
#include "vector.h"

namespace moss {

const RmsNormKernel<float> moss_rms_norm_f32_avx2 = {kAvx2, "moss_rms_norm_f32_avx2", rms_norm<Vec8>};

}  // namespace moss
