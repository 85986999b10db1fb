# SPDX-License-Identifier: Apache-2.0
"""The text that a model is calibrated on: token ids of one or more files, and which texts they were.

Each file is one document. The same files in the same order give the same tokens on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mossquant.checkpoint.locate import is_bundled_tokenizer
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.runner import Tokens
from mossquant.text.text import LARGEST_TRAINING_TEXT, Text, bundled_text, read_text
from mossquant.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class CalibrationText:
    """Token ids to calibrate on.

    Attributes:
        name: of the files, without their folders: it is stored.
        sha256: of each file; a checkpoint records them as seen.
        tokens: int64 [n].
    """

    name: str
    sha256: tuple[str, ...]
    tokens: Tokens

    @classmethod
    def of(cls, weights: Weights, texts: Sequence[str | Path | Text] = ()) -> "CalibrationText":
        """The tokens of these texts, by the tokenizer of a model.

        Args:
            weights: the model.
            texts: files or texts; none: the bundled calibration text, for models with the bundled tokenizer.

        Raises:
            InputError: a text that cannot be read or has no tokens, ids outside the vocabulary, no text for a model
                with a tokenizer of its own, a model without a tokenizer.
        """
        vocab_size, file = weights.config.vocab_size, weights.origin.tokenizer
        by_ids = bool(texts) and all(isinstance(text, Text) and text.ids is not None for text in texts)
        if by_ids:
            tokenizer = None
        elif file is not None:
            tokenizer = Tokenizer.for_folder(file.parent, vocab_size)
        elif vocab_size == Tokenizer.byte_level().vocab_size:
            tokenizer = Tokenizer.byte_level()
        else:
            path = weights.origin.path
            raise InputError(f"{path} has no tokenizer, so the model takes token ids only; give one that has")
        if not texts:
            if tokenizer is None or not is_bundled_tokenizer(tokenizer.sha256):
                path = weights.origin.path
                raise InputError(f"{path} has another tokenizer than the bundled text is for; give --text FILE")
            texts = [bundled_text("calibration")]
        read: list[Text] = []
        parts: list[Tokens] = []
        for given in texts:
            text = given
            if not isinstance(text, Text):
                assert tokenizer is not None
                largest = LARGEST_TRAINING_TEXT
                text = read_text(Path(text), as_bytes=tokenizer.takes_any_bytes, largest=largest)
            parts.append(_ids(text, tokenizer, vocab_size))
            read.append(text)
        joined = np.concatenate(parts)
        if len(joined) == 0:
            raise InputError(f"{read[0].name} has no tokens; give a longer text")
        return cls(", ".join(Path(text.name).name for text in read), tuple(text.sha256 for text in read), joined)

    def __len__(self) -> int:
        return len(self.tokens)

    def said(self, tokens: int) -> str:
        """So many of its tokens, and how often each is read where it has fewer."""
        times = "" if tokens <= len(self) else f" ({len(self):,}, read {tokens / len(self):,.1f} times)"
        return f"{tokens:,} tokens of {self.name}{times}"

    def split(self, held_out: int) -> tuple["CalibrationText", "CalibrationText"]:
        """(what is learned from, the last `held_out` tokens, on which what was learned is judged).

        A short text is judged on its last quarter, one of fewer than four tokens on itself.
        """
        last = min(held_out, len(self) // 4)
        if last == 0:
            return self, self
        cut = len(self) - last
        return replace(self, tokens=self.tokens[:cut]), replace(self, tokens=self.tokens[cut:])

    def windows(self, count: int, length: int) -> Tensor:
        """`count` windows of `length` tokens, spread evenly over the text: int64 [count, length].

        Where the text holds fewer, as many as it holds without overlap; a text shorter than a window is one window.
        """
        length = min(length, len(self))
        count = min(count, len(self) // length)
        starts = [index * (len(self) - length) // max(1, count - 1) for index in range(count)]
        return torch.from_numpy(np.stack([self.tokens[start : start + length] for start in starts]))


def _ids(text: Text, tokenizer: Tokenizer | None, vocab_size: int) -> Tokens:
    if text.ids is not None:
        return text.ids_within(vocab_size)
    if tokenizer is None:
        raise InputError("token ids and texts cannot be mixed; give one or the other")
    if text.special or text.document_separator is not None:
        return text.encoded(tokenizer)[0]
    begins = tokenizer.beginning_of_text
    encoded = np.asarray(tokenizer.encode_documents([text.data]), dtype=np.int64)
    return encoded if begins is None else np.concatenate([[begins], encoded])
