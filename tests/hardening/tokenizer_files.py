# SPDX-License-Identifier: Apache-2.0
"""Damage to `tokenizer.json`: as any JSON, and parts that the library believes until it panics."""

import json
from random import Random
from typing import Any

from hardening.case import Damage, one_of
from hardening.json_files import mutate_json

_IDS = (288, 289, 1 << 22, 50_000_000, 2**31 - 1, 2**32 - 1, 0, 3)
_REGEXES = ("", "(x+x+)+y", "(a*)*b", "(?:a|a)*$", "((a{1,1000}){1,1000}){1,1000}", "[", "\\s*" * 40, "(?=.)", "^|$")
_PARTS: dict[str, tuple[Any, ...]] = {
    "normalizer": (
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100_000},
        {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""},
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}] * 9,
        },
        {"type": "Prepend", "prepend": "x" * 10**6},
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "/////////////////////w=="},
        {"type": "Lowercase"},
        {"type": "NFKD"},
    ),
    "pre_tokenizer": (
        {"type": "FixedLength", "length": 0},
        {"type": "FixedLength", "length": 2**63},
        {"type": "CharDelimiterSplit", "delimiter": "e"},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        {"type": "Sequence", "pretokenizers": []},
        None,
    ),
    "decoder": (
        {"type": "Strip", "content": "a", "start": 2**62, "stop": 2**62},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 100_000},
        {"type": "Sequence", "decoders": []},
        {"type": "Fuse"},
        None,
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "BertProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 0]},
    ),
    "padding": (
        {
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    ),
    "truncation": ({"direction": "Right", "max_length": 10**12, "strategy": "LongestFirst", "stride": 10**12},),
    "model": (
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]] * 3},
        {"type": "Unigram", "unk_id": 10**9, "vocab": [["a", 0.0]] * 3},
        {
            "type": "WordPiece",
            "unk_token": "none",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 10**9,
            "vocab": {"a": 0},
        },
        {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "none"},
        {"type": "BPE", "vocab": {}, "merges": []},
    ),
}


def _part(random: Random, data: bytes) -> Damage:
    """Another normaliser, pre-tokenizer, model, …"""
    tree = json.loads(data)
    part = random.choice(list(_PARTS))
    tree[part] = random.choice(_PARTS[part])
    return Damage(json.dumps(tree).encode(), f"{part} = {tree[part]!r:.120}")


def _believed(random: Random, data: bytes) -> Damage:
    """An id, an expression, or an option of the BPE."""
    tree = json.loads(data)
    kind = random.choice(("id", "added", "regex", "option"))
    if kind == "id":
        name = random.choice(list(tree["model"]["vocab"]))
        tree["model"]["vocab"][name] = new = random.choice(_IDS)
    elif kind == "added":
        new = random.choice(_IDS)
        tree["added_tokens"].append({**tree["added_tokens"][0], "content": random.choice(("", "e", "<x>")), "id": new})
    elif kind == "regex":
        new = random.choice(_REGEXES)
        tree["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": new}
    else:
        key, new = random.choice(
            [
                ("dropout", 0.5),
                ("unk_token", "none"),
                ("continuing_subword_prefix", "x" * 1000),
                ("end_of_word_suffix", "y" * 1000),
                ("byte_fallback", True),
                ("ignore_merges", True),
                ("fuse_unk", True),
                ("merges", []),
            ]
        )
        tree["model"][key] = new
    return Damage(json.dumps(tree).encode(), f"{kind}: {new!r:.100}")


mutate_tokenizer = one_of((2, mutate_json), (1, _part), (1, _believed))
