// SPDX-License-Identifier: Apache-2.0
//
// exp, softplus and the logistic function on vectors of fp32, written once for every instruction set.
//
// `Vec` is one instruction set's vector (avx512.h, avx2.h, portable.h): lanes, load, store, arithmetic. Everything here
// is a template on it, and Vec lives in an unnamed namespace of its file, so that no code compiled for one instruction
// set can be linked into another.

#ifndef MOSS_KERNELS_VEC_MATH_H_
#define MOSS_KERNELS_VEC_MATH_H_

namespace moss {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr float kLn2High = 0.693359375f;  // 10 bits: n * kLn2High is exact for |n| < 2^14
inline constexpr float kLn2Low = -2.12194440054690583e-4f;

// 2^f for f in [-1/2, 1/2]: minimax polynomial of degree 6 with value 1 at 0; relative error < 1.4 * 2^-24.
template <typename Vec>
inline Vec exp2_fraction(Vec f) {
  Vec p = Vec::set(1.5353361959569156e-4f);
  p = fma(p, f, Vec::set(1.3398873852565885e-3f));
  p = fma(p, f, Vec::set(9.61843691766262e-3f));
  p = fma(p, f, Vec::set(5.5503323674201965e-2f));
  p = fma(p, f, Vec::set(2.4022647738456726e-1f));
  p = fma(p, f, Vec::set(6.931471824645996e-1f));
  return fma(p, f, Vec::set(1.0f));
}

// 2^(a b) for a b <= 127; with a fused multiply the fraction of the product is not rounded. 0 where the result would be
// below 2^-125 (Vec4, Vec8) or the smallest denormal (Vec16). NaN stays NaN.
template <typename Vec>
inline Vec exp2_product(Vec a, Vec b) {
  const Vec n = round_exponent(a * b);
  return scale_by_power(exp2_fraction(fms(a, b, n)), n);
}

// exp(x) for x <= 0.
template <typename Vec>
inline Vec exp_negative(Vec x) {
  const Vec n = round_exponent(x * Vec::set(kLog2E));
  const Vec r = fnma(n, Vec::set(kLn2Low), fnma(n, Vec::set(kLn2High), x));
  return scale_by_power(exp2_fraction(r * Vec::set(kLog2E)), n);
}

// log(1 + e) for e in [0, 1], as 2 atanh(s) with s = e / (2 + e) <= 1/3; the series left off is below 2^-25 of the sum.
template <typename Vec>
inline Vec log1p_fraction(Vec e) {
  const Vec s = e / (Vec::set(2.0f) + e);
  const Vec w = s * s;
  Vec p = Vec::set(2.0f / 15);
  p = fma(p, w, Vec::set(2.0f / 13));
  p = fma(p, w, Vec::set(2.0f / 11));
  p = fma(p, w, Vec::set(2.0f / 9));
  p = fma(p, w, Vec::set(2.0f / 7));
  p = fma(p, w, Vec::set(2.0f / 5));
  p = fma(p, w, Vec::set(2.0f / 3));
  return fma(p * w, s, s + s);
}

// log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)): no overflow, no cancellation.
template <typename Vec>
inline Vec softplus(Vec x) {
  return max(x, Vec::set(0.0f)) + log1p_fraction(exp_negative(-abs(x)));
}

// 1 / (1 + exp(-x)), accurate for x of either sign; `*rest` is 1 minus that, without cancellation.
template <typename Vec>
inline Vec logistic(Vec x, Vec* rest) {
  const Vec one = Vec::set(1.0f);
  const Vec e = exp_negative(-abs(x));
  const Vec larger = one / (one + e);
  const Vec smaller = e * larger;
  *rest = where_negative(x, larger, smaller);
  return where_negative(x, smaller, larger);
}

template <typename Vec>
inline Vec logistic(Vec x) {
  Vec rest;
  return logistic(x, &rest);
}

}  // namespace moss

#endif  // MOSS_KERNELS_VEC_MATH_H_
