# SPDX-License-Identifier: Apache-2.0
"""Damage to JSON: one to three values of the tree, keys given twice, and files that are a trap as a whole."""

import json
from random import Random

from hardening.case import Damage, one_of
from hardening.raw import mutate_bytes
from hardening.values import RAW, as_json, mutate_tree


def mutate_json_text(random: Random, text: str) -> tuple[str, str]:
    """JSON with damage, and what was done."""
    if random.random() < 0.04:
        whole = random.choice(RAW)
        return whole, f"the whole is {whole[:20]!r} ({len(whole)} characters)"
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text, "it was a trap as a whole before"  # a model may be damaged twice
    said = [mutate_tree(random, tree) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    return as_json(tree), "; ".join(said)


def _structured(random: Random, data: bytes) -> Damage:
    text, what = mutate_json_text(random, data.decode())
    return Damage(text.encode("utf-8", "surrogatepass"), what)


def _bomb(random: Random, data: bytes) -> Damage:
    """Small values, millions of them: as a list in place of the file's largest list or object, or as the file."""
    item, count = random.choice((("[]", 4_000_000), ("{}", 4_000_000), ("0", 8_000_000), ('"a"', 3_000_000)))
    items = "[" + f"{item}," * count + item + "]"
    tree = json.loads(data)
    key = max(tree, key=lambda key: len(str(tree[key]))) if isinstance(tree, dict) and tree else None
    if key is None or random.random() < 0.3:
        return Damage(items.encode(), f"{count} times {item}")
    rest = as_json({name: value for name, value in tree.items() if name != key})
    return Damage((rest[:-1] + f", {json.dumps(key)}: {items}}}").encode(), f"{key} is {count} times {item}")


mutate_json = one_of((16, _structured), (3, mutate_bytes), (1, _bomb))
