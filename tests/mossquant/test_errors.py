# SPDX-License-Identifier: Apache-2.0
"""A user's mistake is one line, whatever names a file brings into it."""

import pytest

from mossquant.errors import InputError, printable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("größer – 大", "größer – 大"),
        ("a\nb\r\x1b[31m\x07", r"a\nb\r\x1b[31m\x07"),
        ("\udcff\u2028\u202e", r"\udcff\u2028\u202e"),
    ],
)
def test_what_would_break_the_line_is_escaped(given: str, shown: str) -> None:
    assert printable(given) == shown == str(InputError(given))


def test_what_is_kept() -> None:
    assert printable("a\n\tb", keep="\n") == "a\n\\tb"


def test_all_offenders_up_to_eight() -> None:
    few = InputError.listing("x is broken", ["a", "b"], "Mend it.")
    assert str(few) == "x is broken: a; b. Mend it."
    many = InputError.listing("x is broken", [str(number) for number in range(20)], "Mend it.")
    assert str(many) == "x is broken: 0; 1; 2; 3; 4; 5; 6; 7; and 12 more. Mend it."
