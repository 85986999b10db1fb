// SPDX-License-Identifier: Apache-2.0

#include "../vec/portable.h"
#include "vector.h"

namespace moss {

const MixerKernel moss_mixer_f32_portable = {
    kBaseline, "moss_mixer_f32_portable", mixer_conv<Vec4>, mixer_draw<Vec4>,
    {mixer_scan<Vec4, Fp32>, mixer_scan<Vec4, Fp16>, mixer_scan<Vec4, Int8>}};

}  // namespace moss
