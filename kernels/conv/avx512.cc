// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx512.h"
#include "vector.h"

namespace moss {

const ConvKernel<float> moss_conv_f32_avx512 = {
    kAvx512, "moss_conv_f32_avx512", conv_forward<Vec16>, conv_backward<Vec16>};

}  // namespace moss
