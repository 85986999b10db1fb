# SPDX-License-Identifier: Apache-2.0
"""Text that is measured, calibrated or trained on: files of the user, and the two texts that ship with the package.

A text is bytes. A byte-level model (vocabulary 256) takes any; every other tokenizer needs UTF-8.
"""

import hashlib
import json
import lzma
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from mossquant.errors import InputError
from mossquant.files.inputs import read_bytes
from mossquant.text.tokenizer import (
    END_OF_TEXT,
    MOST_RECENT,
    Tokenizer,
    Tokens,
    decode_utf8,
    train_tokenizer,
)

__all__ = [
    "END_OF_TEXT",
    "LARGEST_TEXT",
    "LARGEST_TRAINING_TEXT",
    "MOST_RECENT",
    "Text",
    "Tokenizer",
    "bundled_text",
    "read_text",
    "streams",
    "train_tokenizer",
]


@dataclass(frozen=True)
class Text:
    """A text to measure or calibrate on, or token ids in its place.

    Attributes:
        name: as the user knows it.
        data: its bytes; of token ids, their file's.
        sha256: of `data`, in hexadecimal.
        special: where it spells a special token, that token is meant; else it is taken as letters.
        document_separator: what stands between its documents; None: it is one document.
        ids: token ids int64 [T].
    """

    name: str
    data: bytes
    sha256: str
    special: bool = False
    document_separator: str | None = None
    ids: Tokens | None = None

    @classmethod
    def of(cls, name: str, data: bytes, *, special: bool = False, document_separator: str | None = None) -> "Text":
        """The text `data`, known to the user as `name`; see `Text` for how it is read."""
        return cls(name, data, hashlib.sha256(data).hexdigest(), special, document_separator)

    @classmethod
    def from_ids(cls, path: str | Path) -> "Text":
        """Token ids, a .npy file with an array [T] of integers. Raises `InputError` for any other file."""
        advice = "write the token ids of one text, an array [T] of integers, with numpy.save"
        data = read_bytes(Path(path), largest=8 * LARGEST_TEXT, advice=advice)
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: the size that it says is compared
        except Exception:  # the library takes what is said there for Python
            raise InputError(f"{path} is not a .npy file of numbers; {advice}") from None
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"{path} does not hold one array [T] of integers; {advice}")
        return replace(cls.of(str(path), data), ids=ids.astype(np.int64))

    def ids_within(self, vocab_size: int) -> Tokens:
        """Its token ids. Raises `InputError`: some are of no token of so many."""
        ids = np.empty(0, np.int64) if self.ids is None else self.ids
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            between = f"token ids from {ids.min()} to {ids.max()}, and the vocabulary is 0 to {vocab_size - 1}"
            raise InputError(f"{self.name} has {between}; give the ids that the model's own tokenizer makes")
        return ids

    def encoded(self, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
        """(tokens [T], byte lengths [T]); each separator of documents is an end-of-text token of its length.

        Raises:
            InputError: it is not UTF-8 where that is needed, or holds no separator; the model has no end-of-text token.
        """
        if self.document_separator is None:
            return tokenizer.encode_with_lengths(self.data, special=self.special)
        if tokenizer.end_of_text is None:
            raise InputError("this model has no end-of-text token to put between documents; leave the separator out")
        separator = self.document_separator.encode("utf-8", errors="surrogateescape")
        if separator not in self.data:
            raise InputError(
                f"{self.name} holds no {self.document_separator!r}; give what stands between its documents"
            )
        parts = [tokenizer.encode_with_lengths(part, special=self.special) for part in self.data.split(separator)]
        end, length = np.array([tokenizer.end_of_text]), np.array([len(separator)])
        tokens = [array for ids, _ in parts for array in (ids, end)][:-1]
        lengths = [array for _, counts in parts for array in (counts, length)][:-1]
        return np.concatenate(tokens), np.concatenate(lengths)


LARGEST_TEXT = 1 << 23
"""Most bytes of a file to measure on. It is encoded whole, so that no seam changes a token: 110 bytes a byte."""
LARGEST_TRAINING_TEXT = 1 << 28
"""Most bytes of a file to train on: it is encoded in pieces."""


def read_text(path: Path, *, as_bytes: bool = False, largest: int = LARGEST_TEXT) -> Text:
    """Read a text file.

    Args:
        path: the file.
        as_bytes: the text goes to a byte-level model, so that it need not be UTF-8.
        largest: most bytes that it may have.

    Raises:
        InputError: the file is missing, a folder, a pipe, not readable, too large or empty, or is not UTF-8 where that
            is needed.
    """
    data = read_bytes(path, largest=largest, advice="give another text file")
    if not data:
        raise InputError(f"{path} is empty: give a file with text in it")
    if not as_bytes:
        decode_utf8(data, str(path))
    return Text.of(str(path), data)


def bundled_text(name: Literal["heldout", "calibration"]) -> Text:
    """One of the two texts that ship with the package: modules of Python 3.11's standard library.

    `heldout` (1.09 MB) is what models are measured on, `calibration` (0.53 MB) what statistics are taken from; the
    bundled model was trained on neither. They are the modules that `assets/text/split.json` lists, in that order, each
    followed by one newline.
    """
    folder = resources.files("mossquant") / "assets/text"
    data = lzma.decompress((folder / f"{name}.txt.xz").read_bytes(), format=lzma.FORMAT_XZ)
    text = Text.of(f"bundled {name} text", data)
    expected = json.loads((folder / "split.json").read_bytes())[name]["sha256"]
    if text.sha256 != expected:
        raise InputError(
            f"the {text.name} is damaged (its sha256 is not the one in split.json): install mossquant again"
        )
    return text


def streams(tokens: Tokens, count: int) -> Tokens:
    """Cut tokens [T] into `count` consecutive streams of equal length: [count, T // count].

    The cut depends on T and `count` alone; the last T % count tokens are left out.
    Raises `InputError` where a stream would have fewer than two tokens (one to read, one to predict).
    """
    length = len(tokens) // count
    if length < 2:
        raise InputError(f"{len(tokens)} tokens are too few for {count} streams of two or more: give a longer text")
    return tokens[: count * length].reshape(count, length)
