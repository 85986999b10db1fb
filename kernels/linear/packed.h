// SPDX-License-Identifier: Apache-2.0
//
// The weights of a linear layer as its kernels read them: number formats, packed layout, pack and unpack.
//
//     w[n, k] = code[n, k] * scale[n, k / G]
//
// N outputs, K columns, G columns that share a scale (bf16), or one scale for a row (fp32). Along K the kernels go in
// blocks of B columns: B = G, and 32 where a row has one scale. K is padded to whole blocks with codes 0.
//
// A packed matrix is N rows of `row_bytes` each with nothing between them, so that the outputs n0 .. n1 of it, one
// expert among several for example, are the slice of bytes from n0 * row_bytes to n1 * row_bytes. A row is
//
//     codes   [blocks, B * bits / 8]
//     scales  [blocks] bf16, or [1] fp32
//
// in the byte order of the machine, at any address. 8-bit codes are bytes. 4-bit codes are nibbles that hold code + 8,
// 32 codes in 16 bytes: byte j of these holds code j in its low half and code j + 16 in its high half, so that a mask
// and a shift each give neighbours.

#ifndef MOSS_KERNELS_LINEAR_PACKED_H_
#define MOSS_KERNELS_LINEAR_PACKED_H_

#include <cstddef>
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

// Bytes of a row's codes, after which its scales lie, and of the whole row.
static constexpr std::int64_t row_code_bytes(const WeightFormat& format, std::int64_t columns) {
  return block_count(format, columns) * block_code_bytes(format);
}
static constexpr std::int64_t row_bytes(const WeightFormat& format, std::int64_t columns) {
  return row_code_bytes(format, columns) + scale_count(format, columns) * scale_bytes(format);
}

// Packs codes [N, K] and scales [N, scale_count] (float, or bf16 as its 16 bits) into `packed`, N * row_bytes bytes.
// False where a code lies outside code_min .. code_max; `packed` is then not whole.
bool pack_weight(const WeightFormat& format, std::int64_t outputs, std::int64_t columns, const std::int8_t* codes,
                 const void* scales, std::uint8_t* packed);

// The inverse: codes [N, K], without the padding, and scales [N, scale_count].
void unpack_weight(const WeightFormat& format, std::int64_t outputs, std::int64_t columns, const std::uint8_t* packed,
                   std::int8_t* codes, void* scales);

}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_PACKED_H_
