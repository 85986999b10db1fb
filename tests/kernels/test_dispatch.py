# SPDX-License-Identifier: Apache-2.0
"""Which kernel is used where: a pure function of the CPU's flags, tested with invented ones."""

from itertools import combinations

import pytest

from mossquant.kernels import available, cpu_flags, selected

# Those on vectors, and the numbers that they have forms on vectors for.
ON_VECTORS = ("scan", "conv", "rms_norm", "mixer", "swiglu", "dense")
OPERATIONS = [*((op, "f32") for op in ON_VECTORS), ("quantize", "int8_block_f32")]
WEIGHTS = ("int8", "int8_g32", "int4_g32", "int4_g128")
# Every choice of numbers there is, by operation.
NUMBERS = [
    *((op, numbers) for op in ("scan", "conv", "rms_norm") for numbers in ("f32", "f64")),
    *((op, "f32") for op in ("mixer", "swiglu", "dense")),
    ("quantize", "int8_block_f32"),
    *(("linear", f"f32_{given}_{weight}") for given in ("f32", "int8_block") for weight in WEIGHTS),
]
X86_FLAGS = ("avx2", "avx512", "avx512vnni")
ARM_FLAGS = ("dotprod", "i8mm")
# Where the x86-64 kernels are compiled in, or those for Arm, as a machine with every flag would see it.
HAS_X86 = len(available("scan", flags=["avx2", "avx512"])) == 4
HAS_ARM = len(available("linear", numbers="f32_int8_block_int8", flags=ARM_FLAGS)) == 3


@pytest.mark.parametrize(("op", "numbers"), OPERATIONS)
@pytest.mark.skipif(not HAS_X86, reason="the x86-64 kernels are not compiled in on this processor")
def test_best_that_the_flags_allow(op: str, numbers: str) -> None:
    names = tuple(f"moss_{op}_{numbers}_{isa}" for isa in ("avx512", "avx2", "portable", "scalar"))
    assert selected(op, numbers=numbers, flags=["avx2", "avx512"]) == names[0]
    assert selected(op, numbers=numbers, flags=["avx512"]) == names[0]
    assert selected(op, numbers=numbers, flags=["avx2"]) == names[1]
    assert selected(op, numbers=numbers, flags=[]) == names[2]
    assert available(op, numbers=numbers, flags=["avx2", "avx512"]) == names
    assert available(op, numbers=numbers, flags=["avx2"]) == names[1:]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.skipif(not HAS_X86, reason="the x86-64 kernels are not compiled in on this processor")
def test_best_linear_that_the_flags_allow(weight: str) -> None:
    numbers = f"f32_int8_block_{weight}"
    names = tuple(f"moss_linear_{numbers}_{isa}" for isa in ("avx512vnni", "avx2", "scalar"))
    assert available("linear", numbers=numbers, flags=X86_FLAGS) == names
    assert selected("linear", numbers=numbers, flags=["avx512vnni"]) == names[0]
    assert selected("linear", numbers=numbers, flags=["avx2", "avx512"]) == names[1]
    assert selected("linear", numbers=numbers, flags=["avx512"]) == names[-1]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_best_linear_that_the_flags_of_arm_allow(weight: str) -> None:
    """Where those kernels are not compiled in, their flags choose nothing; linear_integers_test.cc runs on Arm."""
    numbers = f"f32_int8_block_{weight}"
    isas = ("i8mm", "dotprod", "scalar") if HAS_ARM else ("scalar",)
    names = tuple(f"moss_linear_{numbers}_{isa}" for isa in isas)
    assert available("linear", numbers=numbers, flags=ARM_FLAGS) == names
    assert available("linear", numbers=numbers, flags=["dotprod"]) == names[-2:]
    assert selected("linear", numbers=numbers, flags=[]) == names[-1]


@pytest.mark.parametrize(("op", "numbers"), NUMBERS)
def test_scalar_is_last_and_always_there(op: str, numbers: str) -> None:
    for flags in (flags for size in range(6) for flags in combinations(X86_FLAGS + ARM_FLAGS, size)):
        names = available(op, numbers=numbers, flags=flags)
        assert names[0] == selected(op, numbers=numbers, flags=flags)
        assert names[-1] == f"moss_{op}_{numbers}_scalar"
        assert all(name.startswith(f"moss_{op}_{numbers}_") for name in names)


@pytest.mark.parametrize(("op", "numbers"), NUMBERS)
def test_this_machine_is_the_default(op: str, numbers: str) -> None:
    assert selected(op, numbers=numbers) == selected(op, numbers=numbers, flags=cpu_flags())
    assert available(op, numbers=numbers) == available(op, numbers=numbers, flags=cpu_flags())


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="flags: 'avx3' is not known"):
        selected("scan", flags=["avx3"])
    with pytest.raises(ValueError, match="no kernels for operation 'sort' on numbers 'f32'"):
        available("sort")
    with pytest.raises(ValueError, match="no kernels for operation 'scan' on numbers 'int8'"):
        available("scan", numbers="int8")
    with pytest.raises(ValueError, match="no kernels for operation 'linear' on numbers 'f32_int8_block_int3_g32'"):
        available("linear", numbers="f32_int8_block_int3_g32")
