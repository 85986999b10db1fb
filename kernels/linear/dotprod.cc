// SPDX-License-Identifier: Apache-2.0

#include "arm.h"

namespace moss {
namespace {

template <WeightName weight>
void run(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  run_strips<weight, DotSums<1>, DotSums<2>, DotSums<4>>(args, begin, end);
}

}  // namespace

const LinearKernel moss_linear_f32_int8_block_int8_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int8_dotprod", &kArmLayout, run<WeightName::int8>};
const LinearKernel moss_linear_f32_int8_block_int8_g32_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int8_g32_dotprod", &kArmLayout, run<WeightName::int8_g32>};
const LinearKernel moss_linear_f32_int8_block_int4_g32_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int4_g32_dotprod", &kArmLayout, run<WeightName::int4_g32>};
const LinearKernel moss_linear_f32_int8_block_int4_g128_dotprod = {
    kDotprod, "moss_linear_f32_int8_block_int4_g128_dotprod", &kArmLayout, run<WeightName::int4_g128>};

}  // namespace moss
