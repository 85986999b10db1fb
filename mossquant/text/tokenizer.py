# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: bytes as they are, or a byte-level BPE and whatever else `tokenizer.json` can hold.

Bits per byte are counted in the bytes of the text, so that one text measures models with different tokenizers. For
that, every tokenizer says how many bytes each token stands for, and the lengths of the tokens of a text add up to the
length of the text.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mossquant.errors import InputError
from mossquant.files.inputs import read_bytes
from mossquant.files.outputs import new_file
from mossquant.text.declared import TEXT_FILE, DeclaredText, read_declared_text
from mossquant.text.tokenizer_checks import LARGEST_TOKENIZER, parts_of, tokenizer_offenders

Tokens = npt.NDArray[np.int64]

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_OURS = "a tokenizer.json of Hugging Face tokenizers"

# What tokenizers call the end of a text, in the order in which we look.
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")

# How a text is cut before pairs are merged; no token crosses a cut. In order: a word with the one character before it
# (a space, `.`, `_`, `(`, a quote); up to three digits; punctuation with the line end and the indentation after it;
# line ends with the indentation after them; spaces but the last, which belongs to the next word; other spaces.
_CUTS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t]*)*"
    r"|(?:\r?\n[ \t]*)+"
    r"|[^\S\r\n]+(?!\S)"
    r"|[^\S\r\n]+"
    r"|\s"
)

# Documents longer than this are encoded in pieces (`Tokenizer.encode_documents`): the library keeps some hundred
# bytes a token while it encodes one text.
_PIECE = 1 << 20

# A stream decodes with some tokens to the left: as many as have text, as a rule one, and at most these. Where it goes
# on after others, none before the last `MOST_RECENT` of them matters.
_MOST_CONTEXT = 16
MOST_RECENT = 2 * _MOST_CONTEXT


class Tokenizer:
    """Text to tokens and back: bytes as they are, or a Hugging Face `tokenizer.json`.

    Attributes:
        vocab_size: one more than the largest token.
        sha256: of `tokenizer.json`, in hexadecimal; None for the byte-level tokenizer.
        declared: what the model declares about its text (`text.json`); the default where it declares nothing.
        end_of_text: the token that ends a text, or begins one that has no other beginning, or None.
        ends: every token that ends a text.
        beginning_of_text: the token that is put in front of every new text, or None.
        left_out: sections of the file that ask for what is not done: padding, truncation.
        special_tokens: spelling → token of those that stand for no text. Text never encodes to them, not even by
            spelling them out, unless that is asked for.
    """

    def __init__(
        self, library: tokenizers.Tokenizer | None, sha256: str | None, declared: DeclaredText | None = None
    ) -> None:
        self.sha256 = sha256
        self.declared = declared = declared or DeclaredText()
        self.special_tokens = dict(declared.special_tokens)
        self.beginning_of_text = declared.beginning_of_text if declared.add_beginning_of_text else None
        self._library = library
        self._fallback_bytes: dict[int, bytes] = {}
        ends = declared.end_of_text
        self.left_out = [name for name in ("padding", "truncation") if getattr(library, name, None) is not None]
        if library is None:
            self.vocab_size = _BYTES
            silent = self.special_tokens.values()
            self._token_bytes: tuple[bytes, ...] | None = tuple(
                b"" if value in silent else bytes([value]) for value in range(_BYTES)
            )
        else:
            library.no_padding()
            library.no_truncation()
            library.encode_special_tokens = True
            _add_special_tokens(library, declared.special_tokens)
            stored: dict[str, Any] = json.loads(library.to_str())
            added = stored.get("added_tokens", ())
            self.special_tokens |= {token["content"]: token["id"] for token in added if token["special"]}
            self.vocab_size = 1 + max(library.get_vocab(with_added_tokens=True).values())
            named = (library.token_to_id(name) for name in _END_NAMES)
            ends = ends or tuple(token for token in named if token is not None)[:1]
            self._token_bytes = _bytes_of_tokens(library, stored, self.special_tokens, self.vocab_size)
            self._fallback_bytes = _fallback_bytes(library, stored)
        self._silent = frozenset(self.special_tokens.values())
        self.end_of_text = ends[0] if ends else None
        self.ends = frozenset(ends)
        if self._token_bytes is not None:
            self._lengths = np.array([len(token) for token in self._token_bytes], np.int64)

    @classmethod
    def byte_level(cls, declared: DeclaredText | None = None) -> "Tokenizer":
        """The byte-level tokenizer: a token is a byte, the vocabulary is 256."""
        return cls(None, None, declared)

    @classmethod
    def from_file(cls, path: Path, declared: DeclaredText | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises `InputError` if it is missing, not one, or not the one that is `declared`."""
        data = read_bytes(path, largest=LARGEST_TOKENIZER, advice="give a tokenizer.json")
        try:
            offenders, text = tokenizer_offenders(data), data.decode("utf-8")
        except ValueError as error:
            raise InputError(f"{path} is not {_OURS} ({str(error)[:120]}): give another") from None
        if offenders:
            raise InputError.listing(f"{path} is not {_OURS} that can be used", offenders, "Give another.")
        with _library_errors(f"{path} is not {_OURS}"):
            library = tokenizers.Tokenizer.from_str(text)
        if not library.get_vocab_size(with_added_tokens=True):
            raise InputError(f"{path} has an empty vocabulary: give the tokenizer that the model was trained with")
        return cls(library, hashlib.sha256(data).hexdigest(), declared)

    @classmethod
    def for_folder(cls, folder: Path, vocab_size: int) -> "Tokenizer":
        """The tokenizer of a checkpoint or artifact whose model has `vocab_size` entries.

        `tokenizer.json` where there is one; without it, a vocabulary of 256 means bytes. What the model declares about
        its text comes from `text.json`, where there is one.

        Raises:
            InputError: there is neither, the tokenizer has more entries than the model, or `text.json` is damaged or
                does not belong to them.
        """
        path, declared = folder / "tokenizer.json", read_declared_text(folder, vocab_size)
        if not path.is_file():
            if vocab_size == _BYTES:
                return cls.byte_level(declared)
            added = "import it with one (mossquant import --tokenizer FILE)"
            if (folder / "manifest.json").exists() or not (folder / "config.json").exists():  # nothing can be added
                added = "import the original with one (mossquant import --tokenizer FILE), then quantize and export it"
            raise InputError(
                f"{folder} has no tokenizer.json, and a vocabulary of {vocab_size} is not byte-level, "
                f"so the model takes token ids only: {added}"
            )
        tokenizer = cls.from_file(path, declared)
        if tokenizer.vocab_size > vocab_size:
            raise InputError(
                f"{path} has tokens up to {tokenizer.vocab_size - 1}, and the model has a vocabulary of {vocab_size}: "
                "give the tokenizer that the model was trained with"
            )
        return tokenizer

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """The tokens that the file's own post-processor puts (in front of a text, behind it)."""
        if self._library is None:
            return [], []
        with _library_errors("the tokenizer cannot encode a letter"):
            encoding = self._library.encode("a")
        ids, added = encoding.ids, encoding.special_tokens_mask
        front = next((i for i, put in enumerate(added) if not put), len(ids))
        behind = next((i for i, put in enumerate(reversed(added[front:])) if not put), 0)
        return ids[:front], ids[len(ids) - behind :]

    def token(self, spelling: str) -> int | None:
        """The token of this spelling, None where there is none."""
        token: int | None = None if self._library is None else self._library.token_to_id(spelling)
        return token

    def spelling(self, token: int) -> str | None:
        """The spelling of a token in the file, None where there is none."""
        spelling: str | None = None if self._library is None else self._library.id_to_token(token)
        return spelling

    @property
    def takes_any_bytes(self) -> bool:
        """Whether text that is not UTF-8 can be encoded (`read_text(..., as_bytes=...)`)."""
        return self._library is None

    def encode(self, text: str | bytes, *, special: bool = False) -> Tokens:
        """The tokens [T] of a text, int64, with nothing added.

        Args:
            text: the text.
            special: where it spells a special token, that token is meant; else it is taken as letters.

        Raises:
            InputError: bytes that are not UTF-8.
        """
        data = _encoded(text)
        if self._library is None:
            return self._encode_bytes(data, special)[0]
        string = decode_utf8(data, "the text")
        # The library's fast form leaves out the offsets; it exists for lists only.
        with _library_errors("the tokenizer cannot encode this text"), self._parsing(special):
            ids = self._library.encode_batch_fast([string], add_special_tokens=False)[0].ids
        return np.array(ids, np.int64)

    def special_in(self, text: str | bytes) -> list[str]:
        """The special tokens that a text spells."""
        data = _encoded(text)
        return [spelling for spelling in self.special_tokens if spelling.encode("utf-8") in data]

    def _encode_bytes(self, data: bytes, special: bool) -> tuple[Tokens, Tokens]:
        """(tokens [T], byte lengths [T]) without `tokenizer.json`."""
        spellings = {spelling.encode("utf-8"): token for spelling, token in self.special_tokens.items()}
        longest_first = sorted(spellings, key=len, reverse=True)
        parts = re.split(b"(" + b"|".join(map(re.escape, longest_first)) + b")", data) if special else [data]
        tokens = [np.array([spellings[p]]) if i % 2 else np.frombuffer(p, np.uint8) for i, p in enumerate(parts)]
        lengths = [np.array([len(p)]) if i % 2 else np.ones(len(p)) for i, p in enumerate(parts)]
        return np.concatenate(tokens).astype(np.int64), np.concatenate(lengths).astype(np.int64)

    @contextmanager
    def _parsing(self, special: bool) -> Iterator[None]:
        """Whether the library takes special tokens for what they mean, for a while."""
        assert self._library is not None
        self._library.encode_special_tokens = not special
        try:
            yield
        finally:
            self._library.encode_special_tokens = True

    def encode_with_lengths(self, text: str | bytes, *, special: bool = False) -> tuple[Tokens, Tokens]:
        """(tokens [T], byte lengths [T]) of a text; the lengths add up to the text's length in UTF-8.

        They are the lengths of the tokens themselves (`byte_lengths`) where those add up, a special token that the
        text spells having that of its spelling. Where the tokenizer changes the text (a normaliser, a space put in
        front) a token counts the bytes of the text from the end of the token before it to its own end.
        """
        data = _encoded(text)
        if self._library is None:
            return self._encode_bytes(data, special)
        tokens = self.encode(data, special=special)
        if self._token_bytes is not None:
            lengths = self.byte_lengths(tokens)
            for spelling, token in self.special_tokens.items() if special else ():
                lengths[tokens == token] = len(spelling.encode("utf-8"))
            if int(lengths.sum()) == len(data):
                return tokens, lengths
        string = data.decode("utf-8")
        starts = np.cumsum([0, *(len(character.encode("utf-8")) for character in string)])
        with _library_errors("the tokenizer cannot encode this text"), self._parsing(special):
            ends = [end for _, end in self._library.encode(string, add_special_tokens=False).offsets]
        last = np.maximum.accumulate(np.array(ends, np.int64)) if ends else np.zeros(0, np.int64)
        if len(last):
            last[-1] = len(string)
        return tokens, np.diff(starts[last], prepend=0).astype(np.int64)

    def byte_lengths(self, tokens: Tokens) -> Tokens:
        """How many bytes of text each token [T] stands for: int64 [T].

        Raises `InputError` for a tokenizer whose tokens are not byte strings (`encode_with_lengths` serves any).
        """
        if self._token_bytes is None:
            raise InputError("this tokenizer's tokens have no fixed length in bytes: give text in place of token ids")
        return self._lengths[tokens]

    def decode(self, tokens: Iterable[int] | Tokens) -> str:
        """The text of the tokens, as a stream gives it; bytes that are not UTF-8 become U+FFFD.

        Special tokens stand for no text, nor does any number that is no token.
        """
        if self._token_bytes is not None:
            return b"".join(map(self._bytes_of, tokens)).decode("utf-8", errors="replace")
        stream = self.stream()
        return "".join([*map(stream.step, tokens), stream.finish()])

    def stream(self, after: Sequence[int] | Tokens = ()) -> "StreamDecoder":
        """A decoder for tokens that arrive one at a time, `after` others whose text is not wanted again."""
        return StreamDecoder(self, after)

    def encode_documents(self, documents: Iterable[str | bytes]) -> Tokens:
        """The tokens of all documents, each followed by `end_of_text` where there is one: what training reads.

        Documents over 1 MiB are encoded in pieces that end at a line, to bound memory; tokens at such a seam may
        differ from `encode`'s.
        """
        parts: list[Tokens] = []
        end = np.array([] if self.end_of_text is None else [self.end_of_text], np.int64)
        for document in documents:
            parts.extend(self.encode(piece) for piece in _pieces(_encoded(document)))
            parts.append(end)
        return np.concatenate(parts) if parts else end[:0]

    def _has_text(self, token: int | np.int64) -> bool:
        """Whether a token stands for text; one that only the model has does not."""
        if self._token_bytes is not None:
            return self._bytes_of(token) != b""
        assert self._library is not None
        inside = 0 <= token < self.vocab_size and int(token) not in self._silent
        return bool(inside and self._library.id_to_token(int(token)) is not None)

    def _bytes_of(self, token: int | np.int64) -> bytes:
        """The bytes of a token, as far as it stands for bytes."""
        if self._token_bytes is None:
            return self._fallback_bytes.get(int(token), b"")
        return self._token_bytes[token] if 0 <= token < self.vocab_size else b""

    def _text_of(self, tokens: Sequence[int]) -> str:
        """What the library's decoder makes of tokens that have text; in a run of bytes only what is broken is U+FFFD.

        The library would make U+FFFD of every byte of a run that is not whole, so it is given whole ones.
        """
        assert self._library is not None
        spelled: list[str] = []
        for byte, run in groupby(tokens, lambda token: token in self._fallback_bytes):
            if byte:
                whole = b"".join(map(self._bytes_of, run)).decode("utf-8", errors="replace").encode("utf-8")
                spelled += [f"<0x{value:02X}>" for value in whole]
            else:
                spelled += [str(self._library.id_to_token(token)) for token in run]
        decoder = self._library.decoder
        try:
            with _library_errors("the tokenizer cannot decode these tokens"):
                return " ".join(spelled) if decoder is None else str(decoder.decode(spelled))
        except InputError:  # it panics over some pieces that are empty: a model may put out whatever it likes
            return "".join(spelled)


class StreamDecoder:
    """Tokens to text, one token at a time: a character whose bytes are not all there yet is held back.

    A token's text may depend on what stands to its left (whether a space is put in front). So it is what the text of
    some tokens before it grows by, as few as have text themselves. Tokens without text change nothing.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] | Tokens = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        for token in [int(token) for token in after if tokenizer._has_text(token)][-MOST_RECENT:]:
            self.step(token)

    @property
    def ids(self) -> tuple[int, ...]:
        """The few tokens that a stream which goes on has to be begun after."""
        return (*self._context, *self._pending)

    def step(self, token: int) -> str:
        """The text that `token` completes; often empty inside a character of several bytes."""
        tokenizer = self._tokenizer
        if not tokenizer._has_text(token):
            return ""
        self._pending.append(int(token))
        data = tokenizer._bytes_of(token)
        if not data:
            self._utf8.reset()
        text = self._utf8.decode(data)
        held = len(self._utf8.getstate()[0])  # bytes that no character is made of yet
        count = 0
        while held > sum(len(tokenizer._bytes_of(late)) for late in self._pending[len(self._pending) - count :]):
            count += 1
        done, self._pending = self._pending[: len(self._pending) - count], self._pending[len(self._pending) - count :]
        return text if tokenizer._token_bytes is not None else self._grow(done)

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became whole, else nothing."""
        text = self._utf8.decode(b"", final=True)
        done, self._pending = self._pending, []
        return text if self._tokenizer._token_bytes is not None else self._grow(done)

    def _grow(self, done: list[int]) -> str:
        """By what the text grows with these tokens, which then are the context."""
        if not done:
            return ""
        tokens = self._context + done
        text = self._tokenizer._text_of(tokens)[len(self._context_text) :]
        for count in range(1, min(len(tokens), _MOST_CONTEXT) + 1):
            self._context = tokens[-count:]
            self._context_text = self._tokenizer._text_of(self._context)
            if self._context_text:
                break
        return text


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """What the library raises for a file that it cannot work with: Exception itself, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        cause = next(iter(str(error).splitlines()), "")
        raise InputError(f"{what} ({cause[:160]}): give the tokenizer that the model was trained with") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path, *, force: bool = False) -> Tokenizer:
    """Train a byte-level BPE and write it to `path` as `tokenizer.json`. The same texts give the same bytes.

    Args:
        texts: documents; no token crosses from one to the next.
        vocab_size: entries: `END_OF_TEXT`, the 256 bytes, and (vocab_size less 257) merges.
        path: the file to write; `force` replaces one that is there.

    Raises:
        InputError: vocab_size below 257, or more than the text has merges for.
    """
    if vocab_size <= _BYTES:
        raise InputError(
            f"a BPE vocabulary has at least {_BYTES + 1} entries, and {vocab_size} were asked for: ask for more"
        )
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    entries = library.get_vocab_size(with_added_tokens=True)
    if entries < vocab_size:
        raise InputError(
            f"the text has pairs to merge for a BPE of {entries} entries, and {vocab_size} were asked for: "
            f"give more text, or train on bytes (--tokenizer bytes)"
        )
    with new_file(path, force=force) as partial:
        library.save(str(partial), pretty=True)
    return Tokenizer.from_file(path)


def _add_special_tokens(library: tokenizers.Tokenizer, special: Mapping[str, int]) -> None:
    """Make the library know these special tokens. Raises `InputError` where it has them under other ids."""
    # Those that it knows have flags of their own, which adding them again would take away.
    known = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    library.add_special_tokens(sorted(special.keys() - known, key=lambda spelling: special[spelling]))
    found = {spelling: library.token_to_id(spelling) for spelling in special}
    offenders = [f"{name} is {special[name]}, not {token}" for name, token in found.items() if token != special[name]]
    if offenders:
        what = f"{TEXT_FILE} names special tokens that tokenizer.json has elsewhere"
        raise InputError.listing(what, offenders, "Import the original again.")


def _bytes_of_tokens(
    library: tokenizers.Tokenizer, stored: dict[str, Any], special: Mapping[str, int], vocab_size: int
) -> tuple[bytes, ...] | None:
    """The bytes of every token of a byte-level BPE; None for other kinds. `stored` is the library's JSON.

    Such a vocabulary spells each byte as one printable character (GPT-2's table): bytes that are printable in Latin-1
    stand for themselves, the others follow from U+0100 on. Added tokens are spelled as text; special ones stand for no
    text.
    """
    if not _is_byte_level(stored.get("decoder")):
        return None
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = sorted(set(range(_BYTES)) - set(kept))
    values = {chr(value): value for value in kept} | {chr(0x100 + i): value for i, value in enumerate(moved)}
    added = {token["content"] for token in stored.get("added_tokens", ())}
    table = [b""] * vocab_size
    for spelling, token in library.get_vocab(with_added_tokens=True).items():
        if spelling in special:
            continue
        if spelling in added:
            table[token] = spelling.encode("utf-8")
        elif all(character in values for character in spelling):
            table[token] = bytes(values[character] for character in spelling)
        else:
            return None
    return tuple(table)


def _fallback_bytes(library: tokenizers.Tokenizer, stored: dict[str, Any]) -> dict[int, bytes]:
    """Token → byte of those that stand for one byte each, where the decoder makes characters of them."""
    if not any(part.get("type") == "ByteFallback" for part in parts_of(stored.get("decoder"))):
        return {}
    found = {value: library.token_to_id(f"<0x{value:02X}>") for value in range(_BYTES)}
    return {token: bytes([value]) for value, token in found.items() if token is not None}


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def _pieces(data: bytes) -> list[bytes]:
    """`data` in pieces of at most `_PIECE` bytes that end at a line end, or else at the end of a character."""
    pieces: list[bytes] = []
    start = 0
    while len(data) - start > _PIECE:
        stop = data.rfind(b"\n", start, start + _PIECE) + 1
        if stop == 0:
            stop = start + _PIECE
            while stop > start + _PIECE - 3 and 0x80 <= data[stop] < 0xC0:
                stop -= 1
        pieces.append(data[start:stop])
        start = stop
    pieces.append(data[start:])
    return pieces


def _encoded(text: str | bytes) -> bytes:
    """A text in UTF-8; bytes that the command line or a file name brought in as surrogates come back as they were."""
    return text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text


def decode_utf8(data: bytes, where: str) -> str:
    """`data` as text. Raises `InputError`, naming `where` and the first wrong byte, if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}): convert it to UTF-8; "
            "only a byte-level model (vocabulary 256) takes any bytes"
        ) from None
