// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx2.h"
#include "vector.h"

namespace moss {

const MixerKernel moss_mixer_f32_avx2 = {
    kAvx2, "moss_mixer_f32_avx2", mixer_conv<Vec8>, mixer_draw<Vec8>,
    {mixer_scan<Vec8, Fp32>, mixer_scan<Vec8, Fp16>, mixer_scan<Vec8, Int8>}};

}  // namespace moss
