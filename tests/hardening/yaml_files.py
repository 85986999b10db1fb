# SPDX-License-Identifier: Apache-2.0
"""Damage to YAML: values and keys of the tree, and what YAML alone can do (anchors, tags, merges, documents)."""

from random import Random
from typing import Any

import yaml
from hardening.case import Damage, one_of
from hardening.raw import mutate_bytes
from hardening.values import as_json, mutate_tree

_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
_RULE = '  - {role: "*", format: int4_g32}\n'
_TRAPS = {
    "billion laughs": _LAUGHS,
    "recursion": "a: &a [*a]\n",
    "a merge of itself": "a: &a\n  <<: *a\n",
    "nested lists": "[" * 5000 + "]" * 5000,
    "nested lists without end": "[" * 60_000,
    "nested mappings": "{a: " * 3000 + "}" * 3000,
    "nested blocks": "".join(" " * i + "a:\n" for i in range(1500)),
    "dashes": "- " * 50_000 + "x\n",
    "a tag": "!!python/object/apply:os.system ['true']\n",
    "a binary": "version: !!binary aGVsbG8=\n",
    "a tag of its own": "!x {}\n",
    "two documents": "version: 1\n---\nversion: 1\n",
    "a directive": "%YAML 9.9\n---\na: 1\n",
    "key of a list": "? [a, b]\n: c\n",
    "tabs": "\tversion: 1\n",
    "a control character": "version: \x01\n",
    "a byte order": "\ufeffversion: 1\n",
    "a long line": "version: " + "x" * 200_000 + "\n",
    "very many keys": "".join(f"k{i}: {i}\n" for i in range(60_000)),
    "very many rules": "version: 1\nname: x\ntargets: [torch]\nweights:\n" + _RULE * 20_000,
    "very many tokens": "[" + "a, " * 200_000 + "a]",
    "quotes": "a: '" + "''" * 100_000,
    "a block that is folded": "a: >+\n" + "\n" * 200_000,
    "digits with colons": "version: " + "1:" * 50_000 + "1\n",
    "a long pattern": f"version: 1\nname: x\ntargets: [torch]\nweights:\n  - {{role: '{'*a' * 95}', format: int8}}\n",
}


def _tree(random: Random, data: bytes) -> Damage:
    """As YAML, or as JSON, which is YAML too and can hold what no tree can."""
    tree: Any = yaml.safe_load(data)
    what = "; ".join(mutate_tree(random, tree) for _ in range(random.choice((1, 1, 2, 3))))
    try:
        text = yaml.safe_dump(tree, sort_keys=False)
    except yaml.YAMLError:
        text = as_json(tree)
    return Damage(text.encode("utf-8", "surrogatepass"), what)


def _line(random: Random, data: bytes) -> Damage:
    """A line of the file missing, given twice, further in, or with another that is a trap."""
    lines = data.decode().splitlines(keepends=True)
    at = random.randrange(len(lines))
    kind = random.choice(("delete", "double", "indent", "alias", "anchor", "tag", "merge"))
    line = lines[at]
    new = {
        "delete": "",
        "double": line * 2,
        "indent": " " * random.choice((1, 2, 7)) + line,
        "alias": line.replace(": ", ": *a ", 1),
        "anchor": line.replace(": ", ": &a ", 1),
        "tag": line.replace(": ", ": !!str ", 1),
        "merge": line + "<<: {a: b}\n",
    }[kind]
    return Damage("".join([*lines[:at], new, *lines[at + 1 :]]).encode(), f"{kind} line {at + 1}")


def _trap(random: Random, data: bytes) -> Damage:
    name = random.choice(list(_TRAPS))
    before = data.decode() if random.random() < 0.3 else ""
    return Damage((before + _TRAPS[name]).encode(), name)


mutate_yaml = one_of((8, _tree), (4, _line), (4, _trap), (2, mutate_bytes))
