# SPDX-License-Identifier: Apache-2.0
"""The tokens of calibration texts: whose they are, how they are cut, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.open import open_weights
from mossquant.errors import InputError
from mossquant.text.text import Text, Tokenizer, bundled_text


def test_files_are_documents_in_their_order(tmp_path: Path) -> None:
    weights = open_weights("tiny", verb="calibrate")
    for name, words in (("a.txt", "one two three"), ("b.txt", "four")):
        (tmp_path / name).write_text(words)
    text = CalibrationText.of(weights, [tmp_path / "a.txt", tmp_path / "b.txt"])
    assert weights.origin.tokenizer is not None
    tokenizer = Tokenizer.for_folder(weights.origin.tokenizer.parent, weights.config.vocab_size)
    assert tokenizer.decode(text.tokens) == "one two threefour"
    assert list(text.tokens).count(tokenizer.end_of_text) == 2
    assert len(text.sha256) == 2


def test_without_files_it_is_the_bundled_text() -> None:
    text = CalibrationText.of(open_weights("tiny", verb="calibrate"))
    assert text.sha256 == (bundled_text("calibration").sha256,)
    learned, judged = text.split(16384)
    assert len(judged) == 16384
    assert np.array_equal(np.concatenate([learned.tokens, judged.tokens]), text.tokens)
    windows = text.windows(5, 100)
    assert windows.shape == (5, 100)
    assert np.array_equal(windows[0].numpy(), text.tokens[:100])
    assert np.array_equal(windows[-1].numpy(), text.tokens[-100:])


def test_a_short_text_is_cut_short(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(10))
    text = CalibrationText.of(open_weights("tiny", verb="calibrate"), [Text.from_ids(tmp_path / "ids.npy")])
    learned, judged = text.split(16384)
    assert (len(learned), len(judged)) == (8, 2)
    assert text.windows(7, 4).shape == (2, 4)
    assert text.windows(7, 100).shape == (1, 10)
    assert replace(text, tokens=text.tokens[:1]).windows(3, 5).shape == (1, 1)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    weights = open_weights("tiny", verb="calibrate")
    np.save(tmp_path / "ids.npy", np.array([0, weights.config.vocab_size]))
    with pytest.raises(InputError, match="token ids from 0 to 4096, and the vocabulary is 0 to 4095; give the ids"):
        CalibrationText.of(weights, [Text.from_ids(tmp_path / "ids.npy")])
    np.save(tmp_path / "none.npy", np.array([], np.int64))
    with pytest.raises(InputError, match="no tokens"):
        CalibrationText.of(weights, [Text.from_ids(tmp_path / "none.npy")])
