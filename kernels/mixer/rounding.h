// SPDX-License-Identifier: Apache-2.0
//
// How a state is rounded to the format in which it is carried, after the output of its token was computed. Why so says
// mossquant/formats/states.py, whose values these are bit for bit.
//
//     fp16   q = the spacing of fp16 at |h|, 2^-24 at least;   h' = floor(h / q + u) q, at most +-65504
//     int8   of a channel, over its N values:  s = max|h| / 127;   h' = floor(h (127 / max|h|) + u) s
//
// u is the upper bits of a hash of (pair of tokens, channel, state); the second token of a pair takes their complement.
// Products and sums are rounded one by one: files that include this are compiled with -ffp-contract=off.

#ifndef MOSS_KERNELS_MIXER_ROUNDING_H_
#define MOSS_KERNELS_MIXER_ROUNDING_H_

#include <cmath>
#include <cstdint>
#include <cstring>

namespace moss {

inline constexpr std::uint32_t kMixers[] = {0x21F0AAADu, 0x735A2D97u};
inline constexpr float kHalfMost = 65504.0f;
inline constexpr float kLeastDivisor = 0x1p-119f;  // 127 / this is finite
inline constexpr int kHalfDrawn = 13, kInt8Drawn = 17;  // bits of u

static inline std::uint32_t mixed(std::uint32_t value) {
  value = (value ^ value >> 16) * kMixers[0];
  value = (value ^ value >> 15) * kMixers[1];
  return value ^ value >> 15;
}

// The part of the hash that is the channel's and the state's.
static inline std::uint32_t place_of(std::int64_t channel, std::int64_t state) {
  return mixed(mixed(static_cast<std::uint32_t>(channel + 1)) ^ static_cast<std::uint32_t>(state));
}

// What a token adds to the hash: that of its pair, and the bits that are turned in the second of a pair.
namespace {
struct Draw {
  std::uint32_t pair;
  std::uint32_t turned;

  static Draw of(std::int64_t token) {
    const std::int64_t pair = token / 2;
    const std::uint32_t upper = mixed(static_cast<std::uint32_t>(pair >> 32));
    return {mixed(upper ^ static_cast<std::uint32_t>(pair)), token % 2 ? ~0u : 0u};
  }
  std::uint32_t at(std::uint32_t place) const { return mixed(place ^ pair) ^ turned; }
};
}  // namespace

static inline float drawn(std::uint32_t hash, int bits) {
  return static_cast<float>(hash >> (32 - bits)) / static_cast<float>(1 << bits);
}

static inline float rounded_to_half(float h, std::uint32_t hash) {
  int exponent;
  std::frexp(h, &exponent);
  const float step = std::ldexp(1.0f, exponent < -13 ? -24 : exponent - 11);
  const float value = std::floor(h / step + drawn(hash, kHalfDrawn)) * step;
  return value < -kHalfMost ? -kHalfMost : value > kHalfMost ? kHalfMost : value;
}

// A code, as a number.
static inline float rounded_to_code(float h, float reciprocal, std::uint32_t hash) {
  const float scaled = h * reciprocal;
  const float code = std::floor(scaled + drawn(hash, kInt8Drawn));
  return code < -127 ? -127.0f : code > 127 ? 127.0f : code;
}

static inline float code_reciprocal(float largest) { return 127 / (largest < kLeastDivisor ? kLeastDivisor : largest); }

static inline float from_half(std::uint16_t half) {
  const int exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  float value;
  if (exponent == 0x1f) {
    value = fraction ? NAN : HUGE_VALF;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    value = std::ldexp(static_cast<float>(fraction | 0x400), exponent - 25);
  }
  return half >> 15 ? -value : value;
}

// The nearest, of two the even one; at most +-65504.
static inline std::uint16_t to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (std::fabs(value) >= kHalfMost) {
    half = 0x7bff;
  } else if (magnitude < 113u << 23) {
    half = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

// The same on vectors.
template <typename Vec>
inline typename Vec::Bits mixed_bits(typename Vec::Bits value) {
  value = Vec::product(value ^ Vec::template right<16>(value), Vec::set_bits(kMixers[0]));
  value = Vec::product(value ^ Vec::template right<15>(value), Vec::set_bits(kMixers[1]));
  return value ^ Vec::template right<15>(value);
}

template <typename Vec>
inline typename Vec::Bits drawn_bits(const std::uint32_t* places, Draw draw) {
  return mixed_bits<Vec>(Vec::load_bits(places) ^ Vec::set_bits(draw.pair)) ^ Vec::set_bits(draw.turned);
}

template <typename Vec, int kBits>
inline Vec drawn(typename Vec::Bits hash) {
  return Vec::of_integers(Vec::template right<32 - kBits>(hash)) * Vec::set(1.0f / (1 << kBits));
}

template <typename Vec>
inline Vec rounded_to_half(Vec h, typename Vec::Bits hash) {
  using Bits = typename Vec::Bits;
  const Bits power = Vec::difference(h.bits() & Vec::set_bits(0x7f800000u), Vec::set_bits(10u << 23));
  const Bits step = Vec::larger(power, Vec::set_bits(103u << 23));  // 2^-24
  const Vec inverse = Vec::of_bits(Vec::difference(Vec::set_bits(254u << 23), step));
  const Vec value = floor(h * inverse + drawn<Vec, kHalfDrawn>(hash)) * Vec::of_bits(step);
  return min(Vec::set(kHalfMost), max(Vec::set(-kHalfMost), value));
}

template <typename Vec>
inline Vec rounded_to_code(Vec h, Vec reciprocal, typename Vec::Bits hash) {
  const Vec code = floor(h * reciprocal + drawn<Vec, kInt8Drawn>(hash));
  return min(Vec::set(127.0f), max(Vec::set(-127.0f), code));
}

template <typename Vec>
inline Vec code_reciprocal(Vec largest) {
  return Vec::set(127.0f) / max(Vec::set(kLeastDivisor), largest);
}

}  // namespace moss

#endif  // MOSS_KERNELS_MIXER_ROUNDING_H_
