// SPDX-License-Identifier: Apache-2.0

#include "../vec/portable.h"
#include "vector.h"

namespace moss {
namespace {

struct Portable {
  using Vec = Vec4;
  using Ints = Vec4::Ints;

  // Without a sign, numbers are in the order of their bits, NaN above all.
  static Vec larger(Vec a, Vec b) { return Vec::where(bits(a) > bits(b), a, b); }
  static float largest_lane(Vec a) {
    const Vec swapped = {Vec::Floats{a.v[2], a.v[3], a.v[0], a.v[1]}}, most = larger(a, swapped);
    return larger(most, {Vec::Floats{most.v[1], most.v[0], most.v[3], most.v[2]}}).v[0];
  }
  static Ints zeros() { return Ints{}; }
  // 1.5 * 2^23 leaves no place for a fraction, and ends in the integer.
  static Ints nearest(Vec x) {
    const Vec shift = Vec::set(12582912.0f);
    return bits(x + shift) - bits(shift);
  }
  static Ints add(Ints a, Ints b) { return a + b; }
  static std::int32_t sum(Ints a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static void store(Ints a, std::int8_t* codes, std::int64_t count) {
    if (count == Vec::kLanes) {
      for (std::int64_t i = 0; i < Vec::kLanes; ++i) codes[i] = static_cast<std::int8_t>(a[i]);
    } else {
      for (std::int64_t i = 0; i < count; ++i) codes[i] = static_cast<std::int8_t>(a[i]);
    }
  }

 private:
  static Ints bits(Vec a) { return reinterpret_cast<Ints>(a.v); }
};

}  // namespace

const QuantizeKernel moss_quantize_int8_block_f32_portable = {
    kBaseline, "moss_quantize_int8_block_f32_portable", quantize<Portable>};

}  // namespace moss
