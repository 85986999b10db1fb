// SPDX-License-Identifier: Apache-2.0

#include "layout.h"

#include <algorithm>
#include <cstring>

namespace moss {
namespace {

// A strip of so many outputs of 8 or 4 bits, whose columns go in steps of W: where codes lie and how they are written.
template <std::int64_t S, std::int64_t W, int offset8, int offset4>
struct Strip {
  static constexpr std::int64_t byte_of(std::int64_t bits, std::int64_t r, std::int64_t k) {
    if (bits == 8) return (k / W * S + r) * W + k % W;
    return k / 32 * 16 * S + (k % 16 / W * S + r) * W + k % W;
  }
  static constexpr int shift_of(std::int64_t k) { return k % 32 < 16 ? 0 : 4; }

  static std::uint8_t encoded(std::int64_t bits, std::int32_t code) {
    return static_cast<std::uint8_t>(bits == 8 ? code + offset8 : (code + offset4) & 0xf);
  }
  static std::int32_t decoded(std::int64_t bits, std::int64_t k, std::uint8_t byte) {
    if (bits == 8) return static_cast<std::int8_t>(byte - offset8);
    const int nibble = (byte >> shift_of(k)) & 0xf;
    return offset4 ? nibble - offset4 : (nibble ^ 8) - 8;
  }

  static bool pack(const LinearLayout& layout, const WeightFormat& format, std::int64_t outputs, std::int64_t columns,
                   const std::int8_t* codes, const std::uint8_t* scales, std::uint8_t* packed) {
    const std::int64_t code_bytes = strip_code_bytes(layout, format, columns);
    const std::int64_t bytes = strip_bytes(layout, format, columns);
    const std::int64_t count = scale_count(format, columns), width = scale_bytes(format);
    const std::uint8_t zero = encoded(format.bits, 0);
    const int filling = format.bits == 8 ? zero : zero | zero << 4;
    for (std::int64_t n0 = 0; n0 < outputs; n0 += S, packed += bytes) {
      std::memset(packed, filling, static_cast<std::size_t>(code_bytes));
      std::memset(packed + code_bytes, 0, static_cast<std::size_t>(bytes - code_bytes));
      for (std::int64_t r = 0; r < std::min(S, outputs - n0); ++r) {
        const std::int8_t* const row = codes + (n0 + r) * columns;
        for (std::int64_t k = 0; k < columns; ++k) {
          if (row[k] < format.code_min || row[k] > format.code_max) return false;
          std::uint8_t& byte = packed[byte_of(format.bits, r, k)];
          const std::uint8_t code = encoded(format.bits, row[k]);
          if (format.bits == 8) {
            byte = code;
          } else {
            byte = static_cast<std::uint8_t>((byte & (0xf0 >> shift_of(k))) | code << shift_of(k));
          }
        }
        for (std::int64_t b = 0; b < count; ++b) {
          std::memcpy(packed + code_bytes + (b * S + r) * width, scales + ((n0 + r) * count + b) * width,
                      static_cast<std::size_t>(width));
        }
      }
    }
    return true;
  }

  static void unpack(const LinearLayout& layout, const WeightFormat& format, std::int64_t outputs, std::int64_t columns,
                     const std::uint8_t* packed, std::int8_t* codes, std::uint8_t* scales) {
    const std::int64_t code_bytes = strip_code_bytes(layout, format, columns);
    const std::int64_t bytes = strip_bytes(layout, format, columns);
    const std::int64_t count = scale_count(format, columns), width = scale_bytes(format);
    for (std::int64_t n0 = 0; n0 < outputs; n0 += S, packed += bytes) {
      for (std::int64_t r = 0; r < std::min(S, outputs - n0); ++r) {
        for (std::int64_t k = 0; k < columns; ++k) {
          codes[(n0 + r) * columns + k] =
              static_cast<std::int8_t>(decoded(format.bits, k, packed[byte_of(format.bits, r, k)]));
        }
        for (std::int64_t b = 0; b < count; ++b) {
          std::memcpy(scales + ((n0 + r) * count + b) * width, packed + code_bytes + (b * S + r) * width,
                      static_cast<std::size_t>(width));
        }
      }
    }
  }

  static void row(const LinearLayout& layout, const WeightFormat& format, std::int64_t columns,
                  const std::uint8_t* packed, std::int64_t n, float* values) {
    const std::uint8_t* const strip = packed + n / S * strip_bytes(layout, format, columns);
    const std::uint8_t* const scales = strip + strip_code_bytes(layout, format, columns);
    float scale = 0;
    for (std::int64_t k = 0; k < columns; ++k) {
      if (k == 0 || (!format.row_scale && k % format.block == 0)) {
        std::uint32_t bits;
        if (format.row_scale) {
          std::memcpy(&bits, scales + n % S * 4, 4);
        } else {
          std::uint16_t upper;
          std::memcpy(&upper, scales + (k / format.block * S + n % S) * 2, 2);
          bits = static_cast<std::uint32_t>(upper) << 16;
        }
        std::memcpy(&scale, &bits, 4);
      }
      values[k] = static_cast<float>(decoded(format.bits, k, strip[byte_of(format.bits, n % S, k)])) * scale;
    }
  }
};

using Rows = Strip<1, 1, 0, 8>;
using X86 = Strip<16, 4, 128, 8>;
using Arm = Strip<8, 8, 0, 0>;

static_assert(kX86Layout.strip == 16 && kArmLayout.strip == 8);

// run(strip) with the strip of the layout; its S tells them apart.
template <typename Run>
auto with_strip(const LinearLayout& layout, const Run& run) {
  if (layout.strip == kX86Layout.strip) return run(X86{});
  if (layout.strip == kArmLayout.strip) return run(Arm{});
  return run(Rows{});
}

}  // namespace

bool pack_weight(const LinearLayout& layout, const WeightFormat& format, std::int64_t outputs, std::int64_t columns,
                 const std::int8_t* codes, const void* scales, std::uint8_t* packed) {
  return with_strip(layout, [&](auto strip) {
    return strip.pack(layout, format, outputs, columns, codes, static_cast<const std::uint8_t*>(scales), packed);
  });
}

void unpack_weight(const LinearLayout& layout, const WeightFormat& format, std::int64_t outputs, std::int64_t columns,
                   const std::uint8_t* packed, std::int8_t* codes, void* scales) {
  with_strip(layout, [&](auto strip) {
    strip.unpack(layout, format, outputs, columns, packed, codes, static_cast<std::uint8_t*>(scales));
  });
}

void packed_row(const LinearLayout& layout, const WeightFormat& format, std::int64_t columns,
                const std::uint8_t* packed, std::int64_t n, float* values) {
  with_strip(layout, [&](auto strip) { strip.row(layout, format, columns, packed, n, values); });
}

}  // namespace moss
