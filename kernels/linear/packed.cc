// SPDX-License-Identifier: Apache-2.0

#include "packed.h"

#include <cstring>

namespace moss {
namespace {

// Where a 4-bit code of a row lies.
struct Nibble {
  std::int64_t byte;
  int shift;
};

Nibble nibble(std::int64_t k) { return {k / 32 * 16 + k % 16, k % 32 < 16 ? 0 : 4}; }

}  // namespace

bool pack_weight(const WeightFormat& format, std::int64_t outputs, std::int64_t columns, const std::int8_t* codes,
                 const void* scales, std::uint8_t* packed) {
  const std::int64_t code_bytes = row_code_bytes(format, columns), bytes = row_bytes(format, columns);
  for (std::int64_t n = 0; n < outputs; ++n) {
    const std::int8_t* const row_codes = codes + n * columns;
    std::uint8_t* const row = packed + n * bytes;
    // The padding holds codes 0.
    std::memset(row, format.bits == 4 ? 0x88 : 0, static_cast<std::size_t>(code_bytes));
    for (std::int64_t k = 0; k < columns; ++k) {
      const std::int32_t code = row_codes[k];
      if (code < format.code_min || code > format.code_max) return false;
      if (format.bits == 8) {
        row[k] = static_cast<std::uint8_t>(code);
      } else {
        const Nibble at = nibble(k);
        const int other = row[at.byte] & (0xf0 >> at.shift);
        row[at.byte] = static_cast<std::uint8_t>(other | ((code + 8) << at.shift));
      }
    }
    const auto* const row_scales = static_cast<const std::uint8_t*>(scales) + n * (bytes - code_bytes);
    std::memcpy(row + code_bytes, row_scales, static_cast<std::size_t>(bytes - code_bytes));
  }
  return true;
}

void unpack_weight(const WeightFormat& format, std::int64_t outputs, std::int64_t columns, const std::uint8_t* packed,
                   std::int8_t* codes, void* scales) {
  const std::int64_t code_bytes = row_code_bytes(format, columns), bytes = row_bytes(format, columns);
  for (std::int64_t n = 0; n < outputs; ++n) {
    const std::uint8_t* const row = packed + n * bytes;
    for (std::int64_t k = 0; k < columns; ++k) {
      const Nibble at = nibble(k);
      const int code = format.bits == 8 ? row[k] : ((row[at.byte] >> at.shift) & 0xf) - 8;
      codes[n * columns + k] = static_cast<std::int8_t>(code);
    }
    auto* const row_scales = static_cast<std::uint8_t*>(scales) + n * (bytes - code_bytes);
    std::memcpy(row_scales, row + code_bytes, static_cast<std::size_t>(bytes - code_bytes));
  }
}

}  // namespace moss
