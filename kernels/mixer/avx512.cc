// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx512.h"
#include "vector.h"

namespace moss {

const MixerKernel moss_mixer_f32_avx512 = {
    kAvx512, "moss_mixer_f32_avx512", mixer_conv<Vec16>, mixer_draw<Vec16>,
    {mixer_scan<Vec16, Fp32>, mixer_scan<Vec16, Fp16>, mixer_scan<Vec16, Int8>}};

}  // namespace moss
