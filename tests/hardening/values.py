# SPDX-License-Identifier: Apache-2.0
"""Values that a file may hold and no reader expects, and trees of values with one of them changed.

A tree is what JSON gives: dicts, lists, strings, numbers. `Raw` stands for text that no tree can say: a key given
twice, NaN, a number of thousands of digits, nesting without end.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any

RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e-999",
    "9" * 5000,
    "-" + "9" * 400,
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 900 + "]" * 900,
    "[" * 60_000 + "]" * 60_000,
    "[" + "0," * 300_000 + "0]",
    "[" + "{}," * 300_000 + "{}]",
    '"' + "x" * 1_000_000 + '"',
    "{" + ",".join(f'"k{i}":{{}}' for i in range(20_000)) + "}",
    "",
    "'",
    "tru",
)
_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**18, 10**30, 10**300),
    *(0.0, -0.0, 0.5, 1e-300, 1e308, 3.0, -1.5),
    *(True, False, None, "", " ", "x", "0", "1", "fp32", "int4_g32", "../x", "/etc/passwd", "a/b", "..", "\x00"),
    *("\x1b[31mred", "two\nlines", "\ud800", "\u202e", "*" * 150, "x" * 5000, "NaN", "-1", "nan"),
    *([], {}, [0], [[]], {"a": 0}, [None], ["x"], [1, 2, 3], [-1], [10**18], [10**18, 10**18], {"version": 1}),
)


class Raw:
    """Text that is put into a file as it is, in place of a value."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"{self.text[:20]}… ({len(self.text)} characters)" if len(self.text) > 24 else self.text


def hostile(random: Random, old: Any = None) -> Any:
    """Something else in place of a value: often of its own kind, sometimes of another, sometimes no JSON at all."""
    draw = random.random()
    if draw < 0.15:
        return Raw(random.choice(RAW))
    if draw < 0.55:
        if isinstance(old, bool):
            return not old
        if isinstance(old, int):
            return random.choice((old + 1, old - 1, -old, old * 2, old // 2, old * 10**12, old << 40, old + 32, 0))
        if isinstance(old, float):
            return random.choice((-old, old * 1e30, old / 3, int(old), 0.0, 1e308))
        if isinstance(old, str) and old:
            at = random.randrange(len(old))
            other = random.choice(("", "\x00", "é", "\ud800", "\n", "9", old, ".", "../", "*", "0-999999999"))
            return old[:at] + other + old[at + random.choice((0, 1)) :]
        if isinstance(old, list) and old:
            at = random.randrange(len(old))
            return random.choice(
                (old[:at], old[at:], [*old, old[at]], old[::-1], old * 3, [*old, None], [old], old[:at] + old[at + 1 :])
            )
        if isinstance(old, dict) and old:
            key = random.choice(list(old))
            return random.choice(({k: v for k, v in old.items() if k != key}, {key: old[key]}, {**old, key: None}))
    return random.choice(_VALUES)


def places(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, str | int, tuple[str | int, ...]]]:
    """(container, key, path) of every value of a tree."""
    items: Iterator[tuple[Any, Any]] = (
        iter(tree.items()) if isinstance(tree, dict) else iter(enumerate(tree)) if isinstance(tree, list) else iter(())
    )
    for key, value in items:
        yield tree, key, (*path, key)
        yield from places(value, (*path, key))


def mutate_tree(random: Random, tree: Any) -> str:
    """Change one place of a tree, which is a dict or a list; says what was done."""
    found = list(places(tree))
    if not found:
        return "nothing"
    # Half of the time near the top: there are few such values, and they decide most.
    near = [place for place in found if len(place[2]) <= 2]
    container, key, path = random.choice(near if random.random() < 0.4 else found)
    old, where = container[key], ".".join(map(str, path))[:80]
    kind = random.choice(("value", "value", "value", "value", "delete", "rename", "double", "add", "swap"))
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        new = hostile(random, key)
        container[new if isinstance(new, str) else "renamed"] = container.pop(key)
    elif kind == "double" and isinstance(container, dict):
        other = hostile(random, old)
        container[key] = Raw(f"{as_json(old)},{json.dumps(key)}:{as_json(other)}")
        return f"{where} given twice, then {other!r:.60}"
    elif kind == "add" and isinstance(container, dict):
        container[random.choice(("extra", "version", "", "\x1b[31m", "x" * 300, "__class__"))] = hostile(random, old)
    elif kind == "swap":
        other_container, other_key, other_path = random.choice(found)
        # One of the two may lie inside the other: a copy keeps the tree a tree.
        container[key] = deepcopy(other_container[other_key])
        return f"{where} = {'.'.join(map(str, other_path))[:80]}"
    else:
        container[key] = hostile(random, old)
        return f"{where}: {old!r:.40} → {container[key]!r:.60}"
    return f"{kind} {where}"


def as_json(tree: Any) -> str:
    """A tree as JSON text, `Raw` as it is."""
    raw: list[str] = []

    def default(value: Any) -> str:
        assert isinstance(value, Raw)
        raw.append(value.text)
        return f"@raw-{len(raw) - 1}@"

    text = json.dumps(tree, default=default)
    for index, content in enumerate(raw):
        text = text.replace(f'"@raw-{index}@"', content, 1)
    return text
