// SPDX-License-Identifier: Apache-2.0
//
// How the weights of a linear layer lie in memory, packed for a family of instructions: one layout for all kernels of
// the family, whatever the number of rows that they are given.
//
// A packed matrix is a sequence of strips. A strip holds S neighbouring outputs, interleaved as the instructions want
// them; the last one is filled up with codes and scales 0. It has
//
//     codes   [blocks * B * bits / 8 * S]
//     scales  [blocks, S] bf16, or [S] fp32
//
// in the byte order of the machine, and is padded to whole lines of kPackedAlignment bytes where S > 1. So outputs
// n0 .. n1 of a matrix, where n0 is a multiple of S, begin n0 / S strips further.
//
// Where the code of output r of a strip and column k lies, among its codes (k' = k mod 32):
//
//     layout  S    8 bits                           4 bits
//     rows    1    [k], the code                    [k' mod 16], code + 8
//     x86     16   [k / 4][r][k mod 4], code + 128  [k' mod 16 / 4][r][k mod 4], code + 8
//     arm     8    [k / 8][r][k mod 8], the code    [k' mod 16 / 8][r][k mod 8], the code in two's complement
//
// With 4 bits, 32 columns of a strip are 16 S bytes, and a byte holds columns k' and k' + 16 in its low and high half.
// x86: 4 columns of 16 outputs are one operand of vpdpbusd, or two of vpmaddubsw, which take weights as unsigned
// numbers. arm: 8 columns of two outputs are one operand of smmla; as two of sdot they are 4 columns each.

#ifndef MOSS_KERNELS_LINEAR_LAYOUT_H_
#define MOSS_KERNELS_LINEAR_LAYOUT_H_

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace moss {

inline constexpr std::int64_t kPackedAlignment = 64;

struct LinearLayout {
  const char* name;
  std::int64_t strip;  // S, outputs
};

inline constexpr LinearLayout kRowsLayout = {"rows", 1};
inline constexpr LinearLayout kX86Layout = {"x86", 16};
inline constexpr LinearLayout kArmLayout = {"arm", 8};
inline constexpr const LinearLayout* kLinearLayouts[] = {&kRowsLayout, &kX86Layout, &kArmLayout};

// Bytes of a strip's codes, after which its scales lie, and of the whole strip.
static constexpr std::int64_t strip_code_bytes(const LinearLayout& layout, const WeightFormat& format,
                                               std::int64_t columns) {
  return block_count(format, columns) * block_code_bytes(format) * layout.strip;
}
static constexpr std::int64_t strip_bytes(const LinearLayout& layout, const WeightFormat& format,
                                          std::int64_t columns) {
  const std::int64_t bytes =
      strip_code_bytes(layout, format, columns) + scale_count(format, columns) * scale_bytes(format) * layout.strip;
  return layout.strip == 1 ? bytes : (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
}

// Bytes of a packed matrix.
static constexpr std::int64_t packed_bytes(const LinearLayout& layout, const WeightFormat& format, std::int64_t outputs,
                                           std::int64_t columns) {
  return (outputs + layout.strip - 1) / layout.strip * strip_bytes(layout, format, columns);
}

// Packs codes [N, K] and scales [N, scale_count] (float, or bf16 as its 16 bits) into `packed`, packed_bytes.
// False where a code lies outside code_min .. code_max; `packed` is then not whole.
bool pack_weight(const LinearLayout& layout, const WeightFormat& format, std::int64_t outputs, std::int64_t columns,
                 const std::int8_t* codes, const void* scales, std::uint8_t* packed);

// The inverse: codes [N, K], without the padding, and scales [N, scale_count].
void unpack_weight(const LinearLayout& layout, const WeightFormat& format, std::int64_t outputs, std::int64_t columns,
                   const std::uint8_t* packed, std::int8_t* codes, void* scales);

// Row n of the matrix as the codes mean it: values [K] = code * scale, each rounded once. What an embedding looks up.
void packed_row(const LinearLayout& layout, const WeightFormat& format, std::int64_t columns,
                const std::uint8_t* packed, std::int64_t n, float* values);

}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_LAYOUT_H_
