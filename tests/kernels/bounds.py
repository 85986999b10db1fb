# SPDX-License-Identifier: Apache-2.0
"""How far kernels may be from their references, and why.

Differences are taken as a part of a magnitude: the largest value that the same computation gives when every term enters
with its absolute value. It is what rounding errors scale with, whatever cancels in the result.
"""

from math import sqrt

F32_UNIT = 2.0**-24
"""Largest relative error of one fp32 rounding."""

F32_TINY = 2.0**-150
"""Largest absolute error of one fp32 rounding to a denormal number; additions to one are exact."""

F64_RELATIVE = 1e-12
"""Scalar kernel in float64 against autograd through a loop over time, relative to the largest value: a few hundred
roundings of 2^-53 in either, in different orders. (Measured: below 2e-15.)"""

SOFTPLUS_ULPS = 6
"""delta in fp32: |dt| log2(e) reduced with a two-part log 2, a polynomial of 1.4 ulp, sum and quotient of e / (2 + e),
its series, the final sum: each at most one rounding of the result, or two where both parts of a quotient carry it."""

SILU_ULPS = 8
"""p / (1 + exp(-p)) in fp32: exp (3), sum, quotient, product with e below zero, product with p."""

EXP_ULPS = 4
"""exp(delta A), the polynomial and its scaling, besides what `exp_relative` says of the exponent."""


def exp_relative(exponent: float) -> float:
    """Relative error of exp(-exponent) in fp32 when the exponent is a product delta A of fp32 numbers.

    An exponent known to relative accuracy r gives exp to exponent * r: delta carries SOFTPLUS_ULPS, A and log2(e) (and
    their product, where the instruction set has no fused multiply) one rounding each.
    """
    return F32_UNIT * (EXP_ULPS + (SOFTPLUS_ULPS + 3) * exponent)


def f32_accumulated(terms: int) -> float:
    """fp32 kernel against float64, relative to the magnitude, for chains and sums of up to `terms` terms.

    A term has at most 16 roundings before it is added (softplus 6, exp 4, six products); those of the `terms` additions
    are independent and add up like a random walk (Higham and Mary, SIAM J. Sci. Comput. 41, 2019: lambda sqrt(n) u,
    exceeded with probability below 2 exp(-lambda^2 / 2) each; lambda = 5).
    """
    return F32_UNIT * (16 + 5 * sqrt(terms))


def f32_roundings(count: int) -> float:
    """Relative error of a term that went through at most `count` fp32 roundings one after the other, whatever they are.

    (1 + u)^count - 1 <= gamma_count (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1). A sum is off
    by at most this times the sum of its terms' absolute values.
    """
    return count * F32_UNIT / (1 - count * F32_UNIT)
