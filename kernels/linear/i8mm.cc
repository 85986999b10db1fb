// SPDX-License-Identifier: Apache-2.0

#include <type_traits>

#include "arm.h"

namespace moss {
namespace {

// The integers of R rows by smmla: of two rows and a pair of outputs all four sums, 8 products each. An odd row at the
// end goes with itself.
template <int R>
struct MatrixSums {
  int32x4_t sums[(R + 1) / 2][kPairs];

  MatrixSums() {
    for (auto& row : sums) {
      for (int32x4_t& pair : row) pair = vdupq_n_s32(0);
    }
  }

  void add(const int8x16_t (&weights)[kPairs], const Columns<R>& x, int step) {
    for (int r = 0; r < R; r += 2) {
      const int64x2_t one = vreinterpretq_s64_s8(x.halves[r][step / 2]);
      const int64x2_t other = vreinterpretq_s64_s8(x.halves[r + 1 < R ? r + 1 : r][step / 2]);
      const int8x16_t both = vreinterpretq_s8_s64(step % 2 ? vzip2q_s64(one, other) : vzip1q_s64(one, other));
      for (int p = 0; p < kPairs; ++p) sums[r / 2][p] = vmmlaq_s32(sums[r / 2][p], both, weights[p]);
    }
  }

  int32x4_t outputs(int r, int quad) const {
    const int64x2_t one = vreinterpretq_s64_s32(sums[r / 2][2 * quad]);
    const int64x2_t other = vreinterpretq_s64_s32(sums[r / 2][2 * quad + 1]);
    return vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(one, other) : vzip1q_s64(one, other));
  }
};

// A row by itself goes by sdot: half of what smmla multiplies would be of no use.
template <int R>
using RowSums = std::conditional_t<R == 1, DotSums<1>, MatrixSums<R>>;

}  // namespace

const LinearKernel moss_linear_f32_int8_block_int8_i8mm = {
    kI8mm, "moss_linear_f32_int8_block_int8_i8mm", &kArmLayout,
    run_strips<Strip<WeightName::int8, RowSums>>};
const LinearKernel moss_linear_f32_int8_block_int8_g32_i8mm = {
    kI8mm, "moss_linear_f32_int8_block_int8_g32_i8mm", &kArmLayout,
    run_strips<Strip<WeightName::int8_g32, RowSums>>};
const LinearKernel moss_linear_f32_int8_block_int4_g32_i8mm = {
    kI8mm, "moss_linear_f32_int8_block_int4_g32_i8mm", &kArmLayout,
    run_strips<Strip<WeightName::int4_g32, RowSums>>};
const LinearKernel moss_linear_f32_int8_block_int4_g128_i8mm = {
    kI8mm, "moss_linear_f32_int8_block_int4_g128_i8mm", &kArmLayout,
    run_strips<Strip<WeightName::int4_g128, RowSums>>};

}  // namespace moss
