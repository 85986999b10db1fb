# SPDX-License-Identifier: Apache-2.0
"""Tokens to text, one at a time, for every kind of tokenizer and whatever a model puts out."""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import tokenizers
from made_tokenizers import MADE

from mossquant.text.text import Tokenizer

TEXTS = ("Hello world, größer", "the world. Hello x the\n  漢字 🦊 is ising.", " hello  world don't the", "")
KINDS = [*MADE, "bytes"]


@cache
def made(kind: str) -> tuple[tokenizers.Tokenizer | None, Tokenizer]:
    """The library's own, and ours."""
    if kind == "bytes":
        return None, Tokenizer.byte_level()
    text = MADE[kind]().to_str()
    return tokenizers.Tokenizer.from_str(text), Tokenizer(tokenizers.Tokenizer.from_str(text), None)


def expected(kind: str, tokens: Sequence[int]) -> str:
    """The library's text of all tokens at once, a broken run of bytes replaced by that of U+FFFD before."""
    library, _ = made(kind)
    if library is None:
        return bytes(token for token in tokens if 0 <= token < 256).decode(errors="replace")
    special = {token for token, added in library.get_added_tokens_decoder().items() if added.special}
    spelled = [library.id_to_token(token) for token in tokens if token >= 0 and token not in special]
    given: list[int] = []
    run = b""
    for piece in [*(piece for piece in spelled if piece is not None), None]:
        if piece is not None and kind == "byte fallback" and piece.startswith("<0x"):
            run += bytes.fromhex(piece[3:5])
            continue
        whole = run.decode(errors="replace").encode()
        given += [library.token_to_id(f"<0x{value:02X}>") for value in whole]
        given += [] if piece is None else [library.token_to_id(piece)]
        run = b""
    return str(library.decode(given))


def sequences(kind: str, count: int) -> Iterator[list[int]]:
    """Random ids, those outside the vocabulary too; many bytes in a row, and many that continue a character."""
    _, tokenizer = made(kind)
    generator = np.random.default_rng(0)
    fallback = [
        token for token in range(tokenizer.vocab_size) if kind == "byte fallback" and tokenizer._bytes_of(token)
    ]
    for _ in range(count):
        tokens = generator.integers(-2, tokenizer.vocab_size + 3, generator.integers(1, 14))
        low = fallback[0] if fallback else 0
        lead = generator.random(len(tokens)) < 0.5
        if kind in ("byte fallback", "bytes"):
            tokens = np.where(
                lead, low + generator.choice([0x20, 0xC3, 0xE2, 0x96, 0x81, 0xF0, 0x9F], len(tokens)), tokens
            )
        yield tokens.tolist()


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_stream_to_the_text_of_all_at_once_wherever_they_are_cut(kind: str, count: int) -> None:
    _, tokenizer = made(kind)
    generator = np.random.default_rng(1)
    for tokens in sequences(kind, count):
        whole = expected(kind, tokens)
        assert tokenizer.decode(tokens) == whole, tokens
        start = int(generator.integers(0, len(tokens)))
        prompt = tokenizer.stream()
        before = "".join(map(prompt.step, tokens[:start]))
        pieces, stream = [], tokenizer.stream(after=tokens[:start])
        for token in tokens[start:]:
            pieces.append(stream.step(token))
            if generator.random() < 0.4:
                stream = tokenizer.stream(after=stream.ids)
        assert before + "".join([*pieces, stream.finish()]) == whole, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_encoded_is_decoded_as_the_library_does(kind: str) -> None:
    library, tokenizer = made(kind)
    for text in TEXTS:
        tokens = tokenizer.encode(text).tolist()
        found = tokenizer.decode(tokens)
        assert found == (text if library is None else library.decode(tokens, skip_special_tokens=True))
        assert found == text or kind in ("word piece", "suffix", "unigram")


def test_a_space_that_bytes_spell_and_one_that_stands_in_front() -> None:
    library, tokenizer = made("byte fallback")
    assert library is not None
    of = library.token_to_id
    underline = [of("<0xE2>"), of("<0x96>"), of("<0x81>")]
    assert tokenizer.decode([*underline, of("x")]) == "▁x"
    word = of("▁world")
    assert tokenizer.stream().step(word) == "world"
    assert tokenizer.stream(after=[of("▁Hello")]).step(word) == " world"
    assert tokenizer.stream(after=[of("▁Hello"), of("</s>"), -1, 10**6]).step(word) == " world"


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "byte fallback"])
def test_bytes_are_held_back_until_they_are_whole_and_no_longer(kind: str) -> None:
    _, tokenizer = made(kind)
    byte = {tokenizer._bytes_of(token): token for token in range(tokenizer.vocab_size)}
    stream = tokenizer.stream()
    fox = [byte[bytes([value])] for value in "🦊".encode()]
    assert [stream.step(token) for token in fox] == ["", "", "", "🦊"]
    assert [stream.step(fox[-1]) for _ in range(50)] == ["\ufffd"] * 50
    assert [stream.step(token) for token in (*fox[:2], byte[b"x"] if kind != "byte fallback" else fox[0])][:2] == [
        "",
        "",
    ]
    assert stream.finish() == ("\ufffd" if kind == "byte fallback" else "")
    assert len(stream.ids) <= 1


def test_a_decoder_that_panics_ends_nothing() -> None:
    library = MADE["unigram"]()
    library.decoder = tokenizers.decoders.Strip("▁", 1, 1)
    tokenizer = Tokenizer(library, None)
    assert tokenizer.decode([library.token_to_id("▁")]) == "▁"
