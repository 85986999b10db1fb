# SPDX-License-Identifier: Apache-2.0
"""What a `tokenizer.json` may hold, before the library is given it.

The library believes the file: numbers in it become sizes, a normaliser may make a text a thousand times longer, some
parts fail only when text meets them, and then not with an error but with a panic or the end of the process. What is
checked here: numbers of tokens, how much longer a text may become, and parts that draw at random or cannot work.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mossquant.errors import InputError
from mossquant.files.json import parse_json
from mossquant.model.config import MAX_VOCABULARY

__all__ = ["LARGEST_TOKENIZER", "check_tokenizer_size", "tokenizer_offenders"]

LARGEST_TOKENIZER = 1 << 25
"""Most bytes; the largest tokenizers in use, of a quarter of a million tokens, are about as large."""

_LONGEST_ADDED = 16
"""Most characters that a normaliser may put in place of a piece of text, or in front of it, or a BPE around a word."""
_MOST_PARTS = 32
_WORD = 4


def check_tokenizer_size(path: Path) -> None:
    """Refuse a `tokenizer.json` that is too large, before it is copied or hashed. Raises `InputError`."""
    if path.stat().st_size > LARGEST_TOKENIZER:
        raise InputError(f"{path} is larger than {LARGEST_TOKENIZER >> 20} MB: give a tokenizer.json")


def tokenizer_offenders(data: bytes) -> list[str]:
    """What is wrong with the content of a `tokenizer.json`; what the library refuses by itself is left to it.

    Raises:
        ValueError: it is no JSON, see `mossquant.files.json`.
    """
    tree = parse_json(data)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        return ["it has no model"]
    offenders = _model(tree["model"])
    added = tree.get("added_tokens")
    ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    offenders += _ids("added_tokens", ids)
    for section in ("normalizer", "pre_tokenizer", "decoder"):
        parts = list(_parts(tree.get(section)))
        if len(parts) > _MOST_PARTS:
            offenders.append(f"{section} has {len(parts)} parts, {_MOST_PARTS} are the most")
        offenders += [f"{section}: {what}" for part in parts for what in _part(part)]
        growing = [part for part in parts if len(str(part.get("content", ""))) > 1 and part.get("type") == "Replace"]
        if len(growing) > 1:
            offenders.append(f"{section}: {len(growing)} parts of it may make a text longer, one is the most")
    return offenders


def _model(model: dict[str, Any]) -> list[str]:
    vocab, offenders = model.get("vocab"), []
    if isinstance(vocab, dict):
        offenders += _ids("vocab", list(vocab.values()))
        unknown = model.get("unk_token")
        if model.get("type") in ("WordPiece", "WordLevel") and unknown not in vocab:
            offenders.append(f"its unk_token {str(unknown)[:40]!r} is not in its vocabulary")
    if model.get("dropout"):
        offenders.append("dropout draws tokens at random")
    if model.get("type") == "BPE" and model.get("continuing_subword_prefix"):
        offenders.append("a BPE with a continuing_subword_prefix is not supported")
    if len(str(model.get("end_of_word_suffix") or "")) > _LONGEST_ADDED:
        offenders.append(f"its end_of_word_suffix is longer than {_LONGEST_ADDED}")
    return offenders


def _whole_charsmap(text: Any) -> bool:
    """Base64 of a size and a trie of that many bytes, whole words, with text behind it."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return False
    size = int.from_bytes(data[:_WORD], "little")
    return 0 < size <= len(data) - _WORD and size % _WORD == 0


def _ids(where: str, ids: list[Any]) -> list[str]:
    wrong = [number for number in ids if type(number) is not int or not 0 <= number < MAX_VOCABULARY]
    return [f"{where} has token {str(wrong[0])[:40]}, tokens are 0 to {MAX_VOCABULARY - 1}"] if wrong else []


def _parts(section: Any) -> Iterator[dict[str, Any]]:
    """The parts of a section, those of sequences one by one."""
    if isinstance(section, dict):
        yield section
        for key in ("normalizers", "pretokenizers", "decoders"):
            inner = section.get(key)
            for part in inner if isinstance(inner, list) else ():
                yield from _parts(part)


def _part(part: dict[str, Any]) -> Iterator[str]:
    kind, pattern = str(part.get("type"))[:40], part.get("pattern")
    if isinstance(pattern, dict) and "" in pattern.values():
        yield f"{kind} has an empty pattern"
    for key in ("content", "prepend"):
        if len(str(part.get(key) or "")) > _LONGEST_ADDED:
            yield f"{kind} puts more than {_LONGEST_ADDED} characters into a text"
    if kind == "Precompiled" and not _whole_charsmap(part.get("precompiled_charsmap")):
        yield "Precompiled has a precompiled_charsmap that is none"
    if kind == "FixedLength" and part.get("length") == 0:
        yield "FixedLength has length 0"
