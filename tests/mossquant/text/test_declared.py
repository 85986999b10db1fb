# SPDX-License-Identifier: Apache-2.0
"""What a model declares about its text, as a file and in the tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from made_tokenizers import MADE, SPECIAL, byte_level, save

from mossquant.errors import InputError
from mossquant.text.declared import DeclaredText, read_declared_text
from mossquant.text.text import Tokenizer

VOCABULARY = 1000
DECLARED = DeclaredText(
    end_of_text=(260, 258),
    beginning_of_text=257,
    add_beginning_of_text=True,
    special_tokens={"<|im_end|>": 260, "<s>": 257, "</s>": 258},
    token_names={"eos_token": "<|im_end|>", "bos_token": "<s>"},
    chat_template="{{ bos_token }}ü\n",
)


def write(folder: Path, declared: DeclaredText) -> Path:
    (folder / "text.json").write_text(declared.to_json(), encoding="utf-8")
    return folder


def test_the_file_comes_back_and_is_always_the_same(tmp_path: Path) -> None:
    assert read_declared_text(tmp_path, VOCABULARY) is None
    write(tmp_path, DECLARED)
    assert read_declared_text(tmp_path, VOCABULARY) == DECLARED
    backwards = dict(reversed(DECLARED.special_tokens.items()))
    assert DECLARED.model_copy(update={"special_tokens": backwards}).to_json() == DECLARED.to_json()
    (tmp_path / "text.json").write_text(json.dumps({"version": 1, "of a later release": [1]}))
    assert read_declared_text(tmp_path, VOCABULARY) == DeclaredText()


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        ("{", "is not JSON"),
        ("[]", "is not what a model declares"),
        ('{"version": 2, "release": "9.9"}', "written by mossquant 9.9"),
        ('{"version": 1, "end_of_text": 3}', "end_of_text: input should be"),
        ('{"version": 1, "end_of_text": ["3"]}', "end_of_text.0: input should be a valid integer"),
        ('{"version": 1, "end_of_text": [-1]}', "greater than or equal to 0"),
        ('{"version": 1, "add_beginning_of_text": 1}', "valid boolean"),
        ('{"version": 1, "special_tokens": {"": 1}}', "at least 1 character"),
        ('{"version": 1, "chat_template": "\\ud800"}', "is not what a model declares"),
        (json.dumps({"version": 1, "chat_template": "x" * (1 << 18 | 1)}), "at most 262144 characters"),
        (json.dumps({"version": 1, "other": "x" * (1 << 22)}), "larger than 4 MB"),
        (
            '{"version": 1, "end_of_text": [5, 1000], "special_tokens": {"a": 2000}}',
            "vocabulary of 1000 has not: 1000; 2000",
        ),
    ],
)
def test_what_is_no_declaration(tmp_path: Path, stored: str, match: str) -> None:
    (tmp_path / "text.json").write_text(stored)
    with pytest.raises(InputError, match=match) as caught:
        Tokenizer.for_folder(tmp_path, VOCABULARY)
    assert "text.json" in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_tokenizer_of_a_folder_follows_it(tmp_path: Path) -> None:
    folder = save(byte_level(), tmp_path)
    plain = Tokenizer.for_folder(folder, VOCABULARY)
    assert (plain.end_of_text, plain.ends, plain.beginning_of_text) == (258, {258}, None)
    found = Tokenizer.for_folder(write(folder, DECLARED), VOCABULARY)
    assert (found.end_of_text, found.ends, found.beginning_of_text) == (260, {260, 258}, 257)
    assert found.special_tokens == {name: 256 + i for i, name in enumerate(SPECIAL)}
    assert found.sha256 == plain.sha256
    offered = DECLARED.model_copy(update={"add_beginning_of_text": False, "end_of_text": ()})
    found = Tokenizer.for_folder(write(folder, offered), VOCABULARY)
    assert (found.ends, found.beginning_of_text) == ({258}, None)
    write(folder, DeclaredText(special_tokens={"</s>": 3, "<new>": 261}))
    with pytest.raises(InputError, match=r"tokenizer.json has elsewhere: </s> is 3, not 258\. Import"):
        Tokenizer.for_folder(folder, VOCABULARY)


def test_bytes_have_what_is_declared(tmp_path: Path) -> None:
    declared = DeclaredText(end_of_text=(0, 4), special_tokens={"<end>": 0, "<end><end>": 1})
    found = Tokenizer.for_folder(write(tmp_path, declared), 256)
    assert (found.end_of_text, found.ends) == (0, {0, 4})
    tokens, lengths = found.encode_with_lengths("a<end><end>b<end>", special=True)
    assert (tokens.tolist(), lengths.tolist()) == ([97, 1, 98, 0], [1, 10, 1, 5])
    assert found.decode(tokens) == "ab"
    assert bytes(found.encode("<end>").tolist()) == b"<end>"
    # The byte that is also a special token is a byte long, whatever it stands for.
    for special in (False, True):
        tokens, lengths = found.encode_with_lengths("\0a\1", special=special)
        assert (tokens.tolist(), lengths.tolist()) == ([0, 97, 1], [1, 1, 1])


@pytest.mark.parametrize("kind", MADE)
def test_special_tokens_are_parsed_as_the_library_does(tmp_path: Path, kind: str) -> None:
    library = MADE[kind]()
    tokenizer = Tokenizer.for_folder(save(library, tmp_path), VOCABULARY)
    for text in ("<s>Hello world</s>", "<|im_start|>the\nHello <|im_end|> the", "the</s", "<unk>"):
        expected = library.encode(text, add_special_tokens=False)
        tokens, lengths = tokenizer.encode_with_lengths(text, special=True)
        assert tokens.tolist() == expected.ids
        assert lengths.sum() == len(text.encode())
        library.encode_special_tokens = True
        letters = library.encode(text, add_special_tokens=False).ids
        library.encode_special_tokens = False
        assert tokenizer.encode(text).tolist() == letters
        assert tokenizer.special_in(text.encode()) == [name for name in SPECIAL if name in text]


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_special_tokens_keep_their_flags(tmp_path: Path, flag: str) -> None:
    library = byte_level()
    library.add_special_tokens([tokenizers.AddedToken("<|tool|>", special=True, **{flag: True})])
    write(tmp_path, DeclaredText(special_tokens={"<|tool|>": 261, "</s>": 258}))
    tokenizer = Tokenizer.for_folder(save(library, tmp_path), 262)
    text = "a <|tool|> b x<|tool|>y"
    assert tokenizer.encode(text, special=True).tolist() == library.encode(text, add_special_tokens=False).ids


def test_a_declared_special_token_that_the_file_has_as_a_word(tmp_path: Path) -> None:
    library = byte_level()
    library.add_tokens([tokenizers.AddedToken("<|tool|>", special=False)])
    plain = Tokenizer.for_folder(save(library, tmp_path), VOCABULARY)
    assert plain.decode(plain.encode("<|tool|>")) == "<|tool|>"
    declared = DeclaredText(special_tokens={"<|tool|>": library.token_to_id("<|tool|>")})
    found = Tokenizer.for_folder(write(tmp_path, declared), VOCABULARY)
    assert len(found.encode("<|tool|>")) == len("<|tool|>")
    tokens = found.encode("a<|tool|>", special=True)
    assert found.decode(tokens) == "a"
    assert np.array_equal(found.byte_lengths(tokens), [1, 0])
