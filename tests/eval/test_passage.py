# SPDX-License-Identifier: Apache-2.0
"""What a text becomes before it is measured: special tokens, documents, a beginning of text, and token ids as given."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import command
from made_tokenizers import SPECIAL, byte_level
from small import SMALL, random_model, write_model

from mossquant.checkpoint.open import open_weights
from mossquant.errors import InputError
from mossquant.eval.open import open_model
from mossquant.eval.passage import Passage, held_out_passage
from mossquant.eval.perplexity import perplexity
from mossquant.text.declared import DeclaredText
from mossquant.text.text import Text

_CONFIG = replace(SMALL, vocab_size=256 + len(SPECIAL), num_hidden_layers=1)
_START, _STOP, _TURN = 257, 258, 259  # <s>, </s>, <|im_start|>
_TEXT = "<|im_start|>one</s>two é</s></s>three" * 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_model(folder, random_model(_CONFIG))
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


def _declare(folder: Path, *, beginning: bool = False) -> None:
    declared = DeclaredText(end_of_text=(_STOP,), beginning_of_text=_START, add_beginning_of_text=beginning)
    (folder / "text.json").write_text(declared.to_json())


def _library(text: str) -> list[int]:
    """What the library makes of a text; it takes special tokens for what they mean."""
    ids: list[int] = byte_level().encode(text, add_special_tokens=False).ids
    return ids


def _passage(model: Path, text: Text, **options: int) -> Passage:
    return held_out_passage([open_model(model)], text=text, **options)


def test_special_tokens_are_what_the_library_makes_of_them_where_that_is_asked_for(model: Path) -> None:
    text = Text.of("a text", _TEXT.encode())
    letters, parsed = _passage(model, text), _passage(model, replace(text, special=True))
    assert letters.tokens.shape[1] == len(_TEXT.encode())
    assert letters.tokens.max() < 256
    assert parsed.tokens[0].tolist() == _library(_TEXT)
    for passage in (letters, parsed):
        assert passage.lengths is not None
        assert passage.lengths.sum() == len(_TEXT.encode())
    assert "</s>, <|im_start|>" in letters.notes[0]
    assert "--special" in letters.notes[0]
    assert not parsed.notes


def test_documents_are_split_at_the_end_of_text_token(model: Path) -> None:
    _declare(model)
    text = Text.of("a text", b"ab\n---\nc\n---\n\n---\nd", document_separator="\n---\n")
    passage = _passage(model, text)
    assert passage.tokens[0].tolist() == [*_library("ab"), _STOP, *_library("c"), _STOP, _STOP, *_library("d")]
    assert passage.lengths is not None
    assert passage.lengths[0].tolist() == [1, 1, 5, 1, 5, 5, 1]


def test_a_separator_needs_an_end_of_text_token(tmp_path: Path) -> None:
    write_model(tmp_path / "bytes", random_model(replace(_CONFIG, vocab_size=256)))
    with pytest.raises(InputError, match="no end-of-text token"):
        _passage(tmp_path / "bytes", Text.of("a text", b"a|b", document_separator="|"))


def test_every_stream_begins_with_the_declared_beginning_of_text(model: Path) -> None:
    _declare(model, beginning=True)
    passage = _passage(model, Text.of("a text", b"abcdef"), streams_wanted=2)
    assert passage.tokens.tolist() == [[_START, *_library("abc")], [_START, *_library("def")]]
    assert (passage.predicted, passage.predicted_bytes) == (6, 6)


def test_tokens_that_fill_no_stream_are_named(model: Path) -> None:
    assert _passage(model, Text.of("a text", b"abcdef"), streams_wanted=2).notes == ()
    (note,) = _passage(model, Text.of("a text", b"abcdefgh"), streams_wanted=3).notes
    assert note == "the last 2 tokens are left out, so that 3 streams are equally long"


def test_a_beginning_of_text_that_is_spelled_is_not_put_in_twice(model: Path) -> None:
    _declare(model, beginning=True)
    passage = _passage(model, Text.of("a text", b"<s>abc", special=True))
    assert passage.tokens.tolist() == [[_START, *_library("abc")]]
    parts = _passage(model, Text.of("a text", b"<s>abcd", special=True), streams_wanted=2)
    assert parts.tokens.tolist() == [[_START, *_library("ab")], [_START, *_library("cd")]]
    assert parts.predicted_bytes == 4


def test_what_is_declared_counts_for_weights_as_for_their_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "bytes", random_model(replace(_CONFIG, vocab_size=256)))
    (tmp_path / "bytes" / "text.json").write_text(DeclaredText(end_of_text=(10,)).to_json())
    for source in (tmp_path / "bytes", open_weights(tmp_path / "bytes", verb="run")):
        assert open_model(source).tokenizer.ends == {10}


def test_token_ids_need_no_tokenizer_and_measure_as_their_text_does(model: Path, tmp_path: Path) -> None:
    ids = _library(_TEXT)
    by_text = perplexity(model, text=Text.of("a text", _TEXT.encode(), special=True))
    (model / "tokenizer.json").unlink()
    np.save(tmp_path / "ids.npy", np.array(ids, np.uint16))
    by_ids = perplexity(model, text=Text.from_ids(tmp_path / "ids.npy"))
    assert by_ids.nats_per_token == by_text.nats_per_token
    assert (by_ids.bits_per_byte, by_ids.text_bytes) == (None, None)
    assert command("perplexity", model, "--ids", tmp_path / "ids.npy").status == 0
    exporting = command("export", model, "-o", tmp_path / "app")
    assert "--ids FILE.npy" in exporting.out.splitlines()[-1]
    verifying = ("verify", model, tmp_path / "app", "--positions", 16)
    refused = command(*verifying, "--text", model / "config.json")
    assert refused.status == 2
    assert refused.err.endswith("; or measure on token ids, with --ids FILE.npy\n")
    assert command(*verifying, "--ids", tmp_path / "ids.npy").status == 0


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array([0, 261]), "from 0 to 261"),
        (np.array([-1, 5]), "from -1 to 5"),
        (np.zeros((2, 2), np.int64), "one array"),
        (np.zeros(3), "of integers"),
        (np.array([{}]), "not a .npy file"),
        (np.array([1, 2], "m8[s]"), "of integers"),
    ],
)
def test_other_arrays_than_token_ids_are_refused(
    model: Path, tmp_path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], complaint: str
) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(InputError, match=complaint):
        perplexity(model, text=Text.from_ids(tmp_path / "ids.npy"))


@pytest.mark.parametrize("header", ["{", "'''", "{[]:1}", "-" * 9000 + "1", "{'descr': '<i8', 'shape': (True,)}"])
def test_a_damaged_header_of_token_ids_is_one_line(tmp_path: Path, header: str) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(InputError, match="npy file of numbers"):
        Text.from_ids(path)


def test_a_separator_that_stands_nowhere_is_refused(model: Path) -> None:
    _declare(model)
    with pytest.raises(InputError, match="holds no '---'"):
        _passage(model, Text.of("a text", b"a b", document_separator="---"))


def test_the_command_line_says_that_special_tokens_are_letters(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(_TEXT)
    plain = command("perplexity", model, "--text", tmp_path / "text")
    assert "--special" in plain.err
    parsed = command("perplexity", model, "--text", tmp_path / "text", "--special")
    assert parsed.status == 0
    assert not parsed.err
    refused = command("perplexity", model, "--special")
    assert refused.status == 2
    assert "give --text FILE" in refused.err
