// SPDX-License-Identifier: Apache-2.0

#include "../vec/portable.h"
#include "vector.h"

namespace moss {

const ConvKernel<float> moss_conv_f32_portable = {
    kBaseline, "moss_conv_f32_portable", conv_forward<Vec4>, conv_backward<Vec4>};

}  // namespace moss
