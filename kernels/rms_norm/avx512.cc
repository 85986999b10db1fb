// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx512.h"
#include "vector.h"

namespace moss {

const RmsNormKernel<float> moss_rms_norm_f32_avx512 = {kAvx512, "moss_rms_norm_f32_avx512", rms_norm<Vec16>};

}  // namespace moss
