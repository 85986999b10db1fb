# SPDX-License-Identifier: Apache-2.0
"""What a `tokenizer.json` may hold, before the library is given it.

The library believes the file, and most of what it cannot work with it says. Checked here is what would end the process
or take its memory: ids become the length of tables, a normaliser may make a text a thousand times longer, a table of
normalised characters says itself how long it is. Merges that are drawn at random give no tokens that could be compared.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mossquant.errors import InputError
from mossquant.files.json import parse_json
from mossquant.model.config import MAX_VOCABULARY

LARGEST_TOKENIZER = 1 << 25
"""Most bytes; the largest tokenizers in use, of a quarter of a million tokens, are about as large."""

_LONGEST_ADDED = 16
"""Most characters that a part may put into a text in place of what it matches, or in front of it."""
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
    vocab, added = tree["model"].get("vocab"), tree.get("added_tokens")
    ids = [*vocab.values()] if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    wrong = [str(number)[:40] for number in ids if type(number) is not int or not 0 <= number < MAX_VOCABULARY]
    offenders = [f"it has token {wrong[0]}, tokens are 0 to {MAX_VOCABULARY - 1}"] if wrong else []
    if tree["model"].get("dropout"):
        offenders.append("dropout draws tokens at random")
    for section in ("normalizer", "pre_tokenizer", "decoder"):
        parts = list(parts_of(tree.get(section)))
        longest = [len(str(part.get(key) or "")) for part in parts for key in ("content", "prepend")]
        if max(longest, default=0) > _LONGEST_ADDED or sum(length > 1 for length in longest) > 1:
            offenders.append(f"{section} makes a text too much longer: one part may, by {_LONGEST_ADDED} characters")
        if not all(_whole_charsmap(part["precompiled_charsmap"]) for part in parts if "precompiled_charsmap" in part):
            offenders.append(f"{section} has a precompiled_charsmap that is none")
    return offenders


def _whole_charsmap(text: Any) -> bool:
    """Base64 of a size and a trie of that many bytes, whole words, with text behind it."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        return False
    size = int.from_bytes(data[:_WORD], "little")
    return 0 < size <= len(data) - _WORD and size % _WORD == 0


def parts_of(section: Any) -> Iterator[dict[str, Any]]:
    """The parts of a section, those of sequences one by one."""
    if isinstance(section, dict):
        yield section
        for key in ("normalizers", "pretokenizers", "decoders"):
            inner = section.get(key)
            for part in inner if isinstance(inner, list) else ():
                yield from parts_of(part)
