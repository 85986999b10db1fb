# SPDX-License-Identifier: Apache-2.0
"""A `tokenizer.json` is looked at before the library gets it, and what the library raises is a user's error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mossquant.checkpoint.locate import asset_folder
from mossquant.errors import InputError
from mossquant.text.text import Tokenizer
from mossquant.text.tokenizer_checks import tokenizer_offenders

TINY = asset_folder("tiny") / "tokenizer.json"
Tree = dict[str, Any]


def _vocab(number: object) -> Callable[[Tree], object]:
    return lambda tree: tree["model"]["vocab"].update({"e": number})


def _replace(content: str, pattern: str = "e") -> Tree:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


REFUSED: dict[str, tuple[Callable[[Tree], object], str]] = {
    "a token of gigabytes": (_vocab(2**32 - 1), "it has token 4294967295, tokens are 0 to 4194303"),
    "a token that is none": (_vocab(-1), "it has token -1"),
    "an added token": (lambda tree: tree["added_tokens"][0].update(id=2**31), "it has token 2147483648"),
    "a long replacement": (lambda tree: tree.update(normalizer=_replace("e" * 17)), "makes a text too much longer"),
    "replacements of replacements": (
        lambda tree: tree.update(normalizer={"type": "Sequence", "normalizers": [_replace("ee")] * 9}),
        "normalizer makes a text too much longer",
    ),
    "a table of gigabytes": (
        lambda tree: tree.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "/" * 22 + "=="}),
        "a precompiled_charsmap that is none",
    ),
    "dropout": (lambda tree: tree["model"].update(dropout=0.5), "dropout draws tokens at random"),
    "no model": (lambda tree: tree.pop("model"), "it has no model"),
}


def test_the_bundled_tokenizer_passes() -> None:
    assert tokenizer_offenders(TINY.read_bytes()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    tree = json.loads(TINY.read_bytes())
    change(tree)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=message):
        Tokenizer.from_file(path)


def test_a_sentence_piece_normaliser_passes() -> None:
    tree = json.loads(TINY.read_bytes())
    tree["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, _replace("▁", " "), {"type": "NFKC"}],
    }
    assert tokenizer_offenders(json.dumps(tree).encode()) == []


def test_a_panic_of_the_library_is_an_error_of_the_input(tmp_path: Path) -> None:
    """An expression that tries every way to match; the library gives up after so many, with a panic."""
    tree = json.loads(TINY.read_bytes())
    tree["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(x+x+)+y"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    tokenizer = Tokenizer.from_file(path)
    with pytest.raises(InputError, match="the tokenizer cannot encode this text"):
        tokenizer.encode("x" * 300)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate((1 << 25) + 1)
    with pytest.raises(InputError, match="is larger than 32 MB"):
        Tokenizer.from_file(path)
