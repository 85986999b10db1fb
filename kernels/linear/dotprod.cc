// SPDX-License-Identifier: Apache-2.0

#include "arm.h"

namespace moss {

const LinearKernel moss_linear_f32_int8_block_int8_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int8_dotprod", &kArmLayout,
    run_strips<Strip<WeightName::int8, DotSums>>};
const LinearKernel moss_linear_f32_int8_block_int8_g32_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int8_g32_dotprod", &kArmLayout,
    run_strips<Strip<WeightName::int8_g32, DotSums>>};
const LinearKernel moss_linear_f32_int8_block_int4_g32_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int4_g32_dotprod", &kArmLayout,
    run_strips<Strip<WeightName::int4_g32, DotSums>>};
const LinearKernel moss_linear_f32_int8_block_int4_g128_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int4_g128_dotprod", &kArmLayout,
    run_strips<Strip<WeightName::int4_g128, DotSums>>};

}  // namespace moss
