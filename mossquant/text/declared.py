# SPDX-License-Identifier: Apache-2.0
"""What a model declares about its text: `text.json`, beside `tokenizer.json`.

It says what the tokenizer's file does not: where a text ends and begins, which of the tokens are no text, and how a
conversation is written. It belongs to no hash of the model: without it everything is as the tokenizer alone says.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from mossquant.errors import InputError
from mossquant.files.json import read_stored
from mossquant.model.config import MAX_VOCABULARY

TEXT_FILE = "text.json"
TEXT_FILES = ("tokenizer.json", TEXT_FILE)
"""What turns text into tokens and back for a model; what is used wherever it lies."""

_ADVICE = "Import the original again, or take the file away."

_LARGEST = 1 << 22
"""Most bytes: the largest vocabularies have some ten thousand special tokens."""

TokenId = Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]
Spelling = Annotated[str, Field(min_length=1, max_length=1024)]


class DeclaredText(BaseModel):
    """`text.json`; keys that this release does not know are left out.

    Attributes:
        end_of_text: every id that ends a text; the first also ends or begins a document. Empty: as the tokenizer says.
        beginning_of_text: the id that begins a text.
        add_beginning_of_text: whether the model was trained with it in front of every text.
        special_tokens: spelling → id of the tokens that stand for no text.
        token_names: what a chat template calls tokens (`bos_token`, `eos_token`, `pad_token`, …) → their spelling.
        chat_template: Jinja, which makes a prompt of a conversation.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    version: Literal[1] = 1
    end_of_text: Annotated[tuple[TokenId, ...], Field(max_length=256), FailFast()] = ()
    beginning_of_text: TokenId | None = None
    add_beginning_of_text: bool = False
    special_tokens: Annotated[dict[Spelling, TokenId], Field(max_length=1 << 16)] = {}
    token_names: Annotated[dict[Spelling, Spelling], Field(max_length=64)] = {}
    chat_template: Annotated[str, Field(max_length=1 << 18)] | None = None

    def to_json(self) -> str:
        """The content of `text.json`: the same declaration gives the same bytes."""
        ordered = {
            "special_tokens": dict(sorted(self.special_tokens.items(), key=lambda item: (item[1], item[0]))),
            "token_names": dict(sorted(self.token_names.items())),
        }
        return self.model_copy(update=ordered).model_dump_json(indent=2) + "\n"


def read_declared_text(folder: Path, vocab_size: int) -> DeclaredText | None:
    """What the model in `folder`, with `vocab_size` entries, declares; None without `text.json`.

    Raises:
        InputError: it is damaged, of another version, or names ids that the model has not.
    """
    path = folder / TEXT_FILE
    if not path.is_file():
        return None
    noun = "what a model declares about its text"
    declared = read_stored(path, DeclaredText, noun=noun, advice=_ADVICE, largest=_LARGEST)
    ids = {*declared.end_of_text, *declared.special_tokens.values(), declared.beginning_of_text} - {None}
    offenders = [str(token) for token in sorted(token for token in ids if token is not None and token >= vocab_size)]
    if offenders:
        raise InputError.listing(f"{path} names tokens that a vocabulary of {vocab_size} has not", offenders, _ADVICE)
    return declared
