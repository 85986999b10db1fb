# SPDX-License-Identifier: Apache-2.0
"""Texts and tokenizers: nothing but the interpreter, numpy and tokenizers; no model."""

import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mossquant.errors import InputError
from mossquant.text import tokenizer as tokenizer_module
from mossquant.text.text import END_OF_TEXT, Text, Tokenizer, bundled_text, read_text, streams, train_tokenizer

ASSETS = Path(tokenizer_module.__file__).parents[1] / "assets"

# Bytes of held-out text a token of the bundled tokenizer stands for: 3.75 as measured; GPT-2's cuts, which part a line
# end from its indentation, give 3.37 with the same vocabulary.
BYTES_PER_TOKEN = 3.7

SAMPLES = [
    "",
    "def f(x):\n    return x\n\n\n    # ünïcödé 漢字 🦊\r\n\tx = 1234567\n",
    f"spelled out: {END_OF_TEXT} and on",
    "    trailing   \n\n",
    "\x00\x01\u2028 e\u0301 \ufffd",
]


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.from_file(ASSETS / "tiny" / "tokenizer.json")


def corpus() -> list[str]:
    """Enough text for a small vocabulary, always the same."""
    return [f"def f_{i}(x, y={i * i}):\n    return x.value + self.other[{i}]\n" for i in range(200)]


def save(library: tokenizers.Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    library.save(str(path))
    return path


def neox_like(folder: Path) -> Path:
    """As public Mamba checkpoints have it: byte-level BPE, a normaliser, runs of spaces as added tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    library.train_from_iterator(corpus(), trainer)
    library.add_tokens([tokenizers.AddedToken(" " * n, special=False, normalized=True) for n in (2, 4, 8)])
    return save(library, folder)


def llama_like(folder: Path) -> Path:
    """Puts a space in front of the text, spells unknown characters as byte tokens."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>", *(f"<0x{value:02X}>" for value in range(256))],
        show_progress=False,
    )
    library.train_from_iterator(corpus(), trainer)
    path = save(library, folder)
    # The trainer takes byte tokens only as special ones; in real files they are plain entries.
    stored = json.loads(path.read_bytes())
    stored["added_tokens"] = stored["added_tokens"][:2]
    path.write_text(json.dumps(stored))
    return path


def lowercasing(folder: Path) -> Path:
    """Loses information: case, and every word that it does not know."""
    library = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(corpus(), trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return save(library, folder)


# --- texts


def test_read_text_keeps_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    text = read_text(path)
    assert text.data == b"\xef\xbb\xbfa\r\nb"
    assert text == Text.of(str(path), text.data)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"abc\xff", r"not UTF-8 at byte 3 \(0xff\).*byte-level model"),
        (b"abc\xe2\x82", r"not UTF-8 at byte 3 \(0xe2\)"),
    ],
)
def test_read_text_says_what_is_wrong(tmp_path: Path, data: bytes | None, match: str) -> None:
    path = tmp_path / "a.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=match) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_text_for_a_byte_level_model_takes_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"\xff\x00\xfe")
    assert read_text(path, as_bytes=True).data == b"\xff\x00\xfe"


@pytest.mark.parametrize(("name", "least"), [("heldout", 1_000_000), ("calibration", 500_000)])
def test_bundled_texts_are_the_listed_modules(name: str, least: int) -> None:
    text = bundled_text(name)  # type: ignore[arg-type]
    stored = json.loads((ASSETS / "text" / "split.json").read_bytes())[name]
    assert len(text.data) == stored["bytes"] >= least
    start = 0
    for module in stored["modules"]:
        piece = text.data[start : start + module["bytes"]]
        assert Text.of("", piece).sha256 == module["sha256"], module["path"]
        assert text.data[start + module["bytes"]] == ord("\n")
        start += module["bytes"] + 1
    assert start == len(text.data)
    packed = (ASSETS / "text" / f"{name}.txt.xz").read_bytes()
    assert len(packed) == stored["xz_9e_bytes"]


def test_a_damaged_bundled_text_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "assets" / "text"
    folder.mkdir(parents=True)
    (folder / "split.json").write_bytes((ASSETS / "text" / "split.json").read_bytes())
    (folder / "heldout.txt.xz").write_bytes(lzma.compress(b"another text"))
    monkeypatch.setattr("mossquant.text.text.resources.files", lambda package: tmp_path)
    with pytest.raises(InputError, match="damaged"):
        bundled_text("heldout")


def test_streams_are_consecutive_and_equal() -> None:
    cut = streams(np.arange(11), 3)
    assert cut.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(InputError, match="5 tokens are too few for 3 streams"):
        streams(np.arange(5), 3)


# --- bytes as tokens


@given(st.binary())
def test_bytes_are_their_own_tokens(data: bytes) -> None:
    tokenizer = Tokenizer.byte_level()
    tokens, lengths = tokenizer.encode_with_lengths(data)
    assert tokens.dtype == lengths.dtype == np.int64
    assert bytes(tokens.astype(np.uint8)) == data
    assert lengths.tolist() == [1] * len(data)
    assert tokenizer.decode(tokens) == data.decode("utf-8", errors="replace")


def test_a_byte_level_tokenizer_takes_what_is_not_utf8() -> None:
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.takes_any_bytes
    assert tokenizer.vocab_size == 256
    assert tokenizer.end_of_text is None
    # What the command line makes of a byte that is not UTF-8.
    assert tokenizer.encode("a\udcff").tolist() == [97, 255]


# --- a BPE


@pytest.mark.parametrize("text", SAMPLES)
def test_bpe_round_trip(bundled: Tokenizer, text: str) -> None:
    tokens, lengths = bundled.encode_with_lengths(text)
    assert bundled.decode(tokens) == text
    assert lengths.sum() == len(text.encode())
    assert np.array_equal(lengths, bundled.byte_lengths(tokens))
    assert bundled.end_of_text not in tokens


@settings(deadline=None, max_examples=30)
@given(st.text())
def test_bpe_round_trip_of_any_text(bundled: Tokenizer, text: str) -> None:
    tokens, lengths = bundled.encode_with_lengths(text)
    assert bundled.decode(tokens) == text
    assert lengths.sum() == len(text.encode())


def test_each_token_has_the_length_of_its_bytes(bundled: Tokenizer) -> None:
    # Two bytes of é and the three of 漢 are tokens of their own where no merge covers them.
    tokens, lengths = bundled.encode_with_lengths("x é漢\n    return")
    start = 0
    data = "x é漢\n    return".encode()
    for token, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        assert bundled.decode([token]) == data[start : start + length].decode("utf-8", errors="replace")
        start += length
    assert start == len(data)


def test_bundled_tokenizer_on_the_held_out_text(bundled: Tokenizer) -> None:
    text = bundled_text("heldout")
    tokens, lengths = bundled.encode_with_lengths(text.data)
    assert bundled.vocab_size == 4096
    assert bundled.end_of_text == 0
    assert lengths.sum() == len(text.data)
    assert bundled.decode(tokens).encode() == text.data
    assert len(text.data) / len(tokens) >= BYTES_PER_TOKEN


def test_tokens_that_only_the_model_has_stand_for_nothing(bundled: Tokenizer) -> None:
    assert bundled.decode([4100, *bundled.encode("a"), bundled.end_of_text or 0]) == "a"
    assert bundled.byte_lengths(np.array([0])).tolist() == [0]


def test_bpe_needs_utf8(bundled: Tokenizer) -> None:
    assert not bundled.takes_any_bytes
    with pytest.raises(InputError, match="not UTF-8 at byte 1"):
        bundled.encode(b"a\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 1"):
        bundled.encode("a\udcff")


def test_documents_are_followed_by_the_end_of_text(bundled: Tokenizer) -> None:
    tokens = bundled.encode_documents(["a b", b"c"])
    assert tokens.tolist() == [*bundled.encode("a b"), 0, *bundled.encode("c"), 0]
    assert Tokenizer.byte_level().encode_documents([b"\xff", "a"]).tolist() == [255, 97]
    assert bundled.encode_documents([]).tolist() == []


@pytest.mark.parametrize("text", ["one two\n" * 20, "漢" * 40, "a" * 64])
def test_long_documents_are_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch, bundled: Tokenizer, text: str) -> None:
    monkeypatch.setattr(tokenizer_module, "_PIECE", 16)
    tokens = bundled.encode_documents([text])
    assert len(tokens) > len(bundled.encode(text))
    assert bundled.decode(tokens) == text


# --- tokenizers that others made


@pytest.mark.parametrize("make", [neox_like, llama_like, lowercasing])
def test_lengths_add_up_for_any_tokenizer(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    tokenizer = Tokenizer.from_file(make(tmp_path))
    for text in (*SAMPLES, "    return  self.OTHER[7]        + 1", " A e\u0301 B"):
        tokens, lengths = tokenizer.encode_with_lengths(text)
        assert len(tokens) == len(lengths)
        assert (lengths >= 0).all()
        assert lengths.sum() == (len(text.encode()) if len(tokens) else 0), text


def test_added_runs_of_spaces_count_their_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(neox_like(tmp_path))
    tokens = tokenizer.encode("        x")
    assert tokenizer.byte_lengths(tokens).tolist() == [8, 1]
    assert tokenizer.decode(tokens) == "        x"


def test_lengths_where_the_tokenizer_puts_a_space_in_front(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(llama_like(tmp_path))
    tokens, lengths = tokenizer.encode_with_lengths("return é")
    assert tokenizer.decode(tokens) == "return é"
    assert lengths.sum() == len("return é".encode())
    with pytest.raises(InputError, match="no fixed length"):
        tokenizer.byte_lengths(tokens)


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(neox_like(tmp_path)))
    library.enable_truncation(max_length=2)
    library.enable_padding(length=50)
    tokenizer = Tokenizer.from_file(save(library, tmp_path))
    text = "return x.value + self.other[7]"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["</s>", END_OF_TEXT])
def test_end_of_text_by_its_usual_names(tmp_path: Path, name: str) -> None:
    make = llama_like if name == "</s>" else neox_like
    tokenizer = Tokenizer.from_file(make(tmp_path))
    stored = json.loads((tmp_path / "tokenizer.json").read_bytes())
    assert {"id": tokenizer.end_of_text, "content": name}.items() <= next(
        token for token in stored["added_tokens"] if token["content"] == name
    ).items()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (None, "cannot be read"),
        (b"{", "not a tokenizer.json"),
        (b'{"model": 3}', "not a tokenizer"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, data: bytes | None, match: str) -> None:
    path = tmp_path / "tokenizer.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=match) as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def test_an_empty_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty vocabulary"):
        Tokenizer.from_file(save(tokenizers.Tokenizer(models.BPE()), tmp_path))


def test_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    assert Tokenizer.for_folder(tmp_path, 256).takes_any_bytes
    with pytest.raises(InputError, match="vocabulary of 50280 is not byte-level"):
        Tokenizer.for_folder(tmp_path, 50280)
    library = Tokenizer.from_file(neox_like(tmp_path))
    # A model may have more entries than its tokenizer (public Mamba: 50280 and 50277), never fewer.
    assert Tokenizer.for_folder(tmp_path, library.vocab_size + 3).sha256 == library.sha256
    with pytest.raises(InputError, match=f"up to {library.vocab_size - 1}, and the model has a vocabulary of 256"):
        Tokenizer.for_folder(tmp_path, 256)


# --- training


TRAIN = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from mossquant.text.text import train_tokenizer
texts = [f"def f_{{i}}(x, y={{i * i}}):\\n    return x.value + self.other[{{i}}]\\n" for i in range(200)]
train_tokenizer(texts, 300, Path({output!r}))
"""


def test_training_gives_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    here = train_tokenizer(corpus(), 300, tmp_path / "here.json")
    expected = (tmp_path / "here.json").read_bytes()
    output = tmp_path / "four.json"
    program = TRAIN.format(path=sys.path, output=str(output))
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"RAYON_NUM_THREADS": "4"})
    assert output.read_bytes() == expected
    assert here.vocab_size == 300
    assert here.end_of_text == 0


def test_no_token_crosses_a_cut(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["x = [(1234567)]\n        return self.value\n" * 50], 284, tmp_path / "t.json")
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("x = [(1234567)]\n        return self.value\n")]
    assert pieces == ["x", " =", " [(", "123", "456", "7", ")]\n        ", "return", " self", ".value", "\n"]


@pytest.mark.parametrize(
    ("size", "match"), [(256, "at least 257 entries"), (4000, "give more text, or train on bytes")]
)
def test_training_says_when_it_cannot(tmp_path: Path, size: int, match: str) -> None:
    with pytest.raises(InputError, match=match):
        train_tokenizer(corpus(), size, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
