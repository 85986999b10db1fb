# SPDX-License-Identifier: Apache-2.0
"""The tokens that models are measured on: what a text becomes, and whether it may be measured on.

A text is cut into S consecutive streams of equal length L; each stream begins with the model's initial state, which is
then carried to its end. A stream's first token is read and not predicted; where the model declares a beginning of text
that is put in front of every text, it is that one. All of it depends on the text, the tokenizer and S alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mossquant.errors import InputError
from mossquant.eval.open import OpenModel
from mossquant.runner import Tokens
from mossquant.text.text import Text, bundled_text, read_text, streams


@dataclass(frozen=True)
class Passage:
    """Tokens to measure on.

    Attributes:
        name: of the text, as the user knows it.
        sha256: of the whole text, in hexadecimal.
        seen_by: paths of the models that were trained or calibrated on this text.
        tokens: [S, L].
        lengths: [S, L], bytes of text that each token stands for; None where token ids were given.
        special: whether special tokens that the text spells were taken for tokens.
        document_separator: what stood between its documents, None where they were not told apart.
        notes: what the user should know, a sentence each.
    """

    name: str
    sha256: str
    seen_by: tuple[str, ...]
    tokens: Tokens
    lengths: Tokens | None
    special: bool
    document_separator: str | None
    notes: tuple[str, ...] = ()

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted, S · (L − 1)."""
        return int(self.tokens.shape[0] * (self.tokens.shape[1] - 1))

    @property
    def predicted_bytes(self) -> int | None:
        """Bytes of text of the tokens that are predicted."""
        return None if self.lengths is None else int(self.lengths[:, 1:].sum())


def held_out_passage(
    models: Sequence[OpenModel],
    *,
    text: str | Path | Text | None = None,
    tokens: int | None = None,
    streams_wanted: int = 1,
    allow_seen: bool = False,
    allow_fewer: bool = False,
) -> Passage:
    """The tokens on which all of these models are measured.

    Args:
        models: one or more; they must share a tokenizer, or with token ids the size of the vocabulary.
        text: a file or a text; None: the held-out text of the bundled model, for models with its tokenizer.
        tokens: only so many tokens from the text's beginning; None: all.
        streams_wanted: S.
        allow_seen: measure also on text that one of the models has seen.
        allow_fewer: take all tokens of a text that has fewer than `tokens`.

    Raises:
        InputError: models with different tokenizers, or none; no text for another tokenizer than the bundled one's; a
            text that was seen; one that is too short, or shorter than asked for; ids outside the vocabulary.
    """
    if streams_wanted < 1:
        raise InputError(f"{streams_wanted} streams were asked for; give one or more")
    if tokens is not None and tokens < 2 * streams_wanted:
        raise InputError(f"{tokens} tokens are too few for {streams_wanted} streams of two or more; give more tokens")
    by_ids = isinstance(text, Text) and text.ids is not None
    kinds = [(None if by_ids else _tokenizer_of(model), model.runner.info.vocab_size) for model in models]
    first, *others = [f"{model.path} (vocabulary {model.runner.info.vocab_size})" for model in models]
    others = [other for other, kind in zip(others, kinds[1:], strict=True) if kind != kinds[0]]
    if others:
        what = f"another tokenizer or vocabulary than {first}"
        raise InputError.listing(what, others, "Compare models that share a tokenizer.")
    source = _text(models[0], text)
    seen_by = tuple(model.path for model in models if source.sha256 in model.runner.info.seen_text)
    if seen_by and not allow_seen:
        raise InputError(
            f"{source.name} was used to train or calibrate {', '.join(seen_by)}, so that a figure on it would flatter; "
            "give another --text, or --allow-seen to measure all the same"
        )
    lengths, begins, notes = None, None, tuple[str, ...]()
    if source.ids is not None:
        ids = source.ids_within(kinds[0][1])
    else:
        tokenizer = models[0].tokenizer
        ids, lengths = source.encoded(tokenizer)
        begins = tokenizer.beginning_of_text
        spelled = [] if source.special else tokenizer.special_in(source.data)
        spelled = [token for token in spelled if token != source.document_separator]
        if spelled:
            named = ", ".join(spelled[:4])
            notes = (
                f"{source.name} spells special tokens ({named}), taken as letters; --special takes them as tokens",
            )
    if tokens is not None and len(ids) < tokens and not allow_fewer:
        raise InputError(f"{source.name} has {len(ids)} tokens, {tokens} were asked for; give a longer text or fewer")
    if source.special and len(ids) and ids[0] == begins and lengths is not None:
        ids, lengths = ids[1:], lengths[1:]  # it is put in front of every stream, this one too
    left_out = len(ids[:tokens]) % streams_wanted
    if left_out:
        notes = (*notes, f"the last {left_out} tokens are left out, so that {streams_wanted} streams are equally long")
    cut = streams(ids[:tokens], streams_wanted)
    counts = None if lengths is None else streams(lengths[:tokens], streams_wanted)
    if begins is not None and counts is not None:
        front = ((0, 0), (1, 0))
        cut, counts = np.pad(cut, front, constant_values=begins), np.pad(counts, front)
    how = source.special, source.document_separator
    return Passage(source.name, source.sha256, seen_by, cut, counts, *how, notes)


def _tokenizer_of(model: OpenModel) -> tuple[str | None, int | None]:
    """What models must share to be measured on one text: the SHA-256 of the tokenizer, and what begins a text."""
    try:
        return model.tokenizer.sha256, model.tokenizer.beginning_of_text
    except InputError as error:
        raise InputError(f"{error}; or measure on token ids, with --ids FILE.npy") from None


def _text(model: OpenModel, text: str | Path | Text | None) -> Text:
    if isinstance(text, Text):
        return text
    if text is not None:
        return read_text(Path(text), as_bytes=model.tokenizer.takes_any_bytes)
    if not model.has_bundled_tokenizer:
        raise InputError(f"{model.path} has another tokenizer than the bundled text is for; give --text FILE")
    return bundled_text("heldout")
