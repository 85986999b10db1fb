// SPDX-License-Identifier: Apache-2.0
//
// The number formats of a linear layer's weights.
//
//     w[n, k] = code[n, k] * scale[n, k / G]
//
// N outputs, K columns, G columns that share a scale (bf16), or one scale for a row (fp32). Along K the kernels go in
// blocks of B columns: B = G, and 32 where a row has one scale. K is padded to whole blocks with codes 0.

#ifndef MOSS_KERNELS_LINEAR_FORMAT_H_
#define MOSS_KERNELS_LINEAR_FORMAT_H_

#include <cstdint>

namespace moss {

// In the order of kWeightFormats; spelled as in recipes.
enum class WeightName { int8, int8_g32, int4_g32, int4_g128 };

struct WeightFormat {
  const char* name;
  std::int64_t bits;      // of a code: 8 or 4
  std::int64_t block;     // B, columns; a multiple of 32
  bool row_scale;         // one fp32 scale a row; otherwise one bf16 scale a block
  std::int32_t code_min;
  std::int32_t code_max;
};

// -128 is not a code: no kernel meets (-128) * (-128), of which two overflow an int16.
inline constexpr WeightFormat kWeightFormats[] = {
    {"int8", 8, 32, true, -127, 127},
    {"int8_g32", 8, 32, false, -127, 127},
    {"int4_g32", 4, 32, false, -8, 7},
    {"int4_g128", 4, 128, false, -8, 7},
};

// `static`: files compiled for different instruction sets must not share the code of one.
static constexpr const WeightFormat& weight_format(WeightName name) { return kWeightFormats[static_cast<int>(name)]; }

static constexpr std::int64_t block_count(const WeightFormat& format, std::int64_t columns) {
  return (columns + format.block - 1) / format.block;
}
static constexpr std::int64_t scale_count(const WeightFormat& format, std::int64_t columns) {
  return format.row_scale ? 1 : block_count(format, columns);
}
static constexpr std::int64_t scale_bytes(const WeightFormat& format) { return format.row_scale ? 4 : 2; }
static constexpr std::int64_t block_code_bytes(const WeightFormat& format) { return format.block * format.bits / 8; }

}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_FORMAT_H_
