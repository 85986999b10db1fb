// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx2.h"
#include "vector.h"

namespace moss {

const ConvKernel<float> moss_conv_f32_avx2 = {kAvx2, "moss_conv_f32_avx2", conv_forward<Vec8>, conv_backward<Vec8>};

}  // namespace moss
