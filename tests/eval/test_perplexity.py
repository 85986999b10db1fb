# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a text against sums over its bytes, and what must not be measured."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import CUT_NATS

from mossquant.errors import InputError
from mossquant.eval.perplexity import perplexity
from mossquant.files.outputs import json_bytes
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import Text


def _expected_nats(folder: Path, data: bytes) -> float:
    tokens = torch.tensor(list(data))[None]
    logits, _ = TorchRunner.open(folder, dtype=torch.float64).model(tokens[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]))


@pytest.mark.parametrize("tokens", [None, 500])
def test_one_stream_is_the_mean_loss_of_the_text(byte_model: Path, text_file: Path, tokens: int | None) -> None:
    report = perplexity(byte_model, text=text_file, tokens=tokens)
    nats = _expected_nats(byte_model, text_file.read_bytes()[:tokens])
    count = (tokens or 3000) - 1
    assert report.nats_per_token == pytest.approx(nats, abs=CUT_NATS)
    assert report.perplexity == pytest.approx(math.exp(nats), rel=CUT_NATS)
    assert report.bits_per_byte == pytest.approx(nats / math.log(2), abs=2 * CUT_NATS)
    assert (report.tokens, report.text_bytes, report.streams) == (count, count, 1)
    assert report.standard_error is not None
    assert not report.seen
    assert json.loads(json_bytes(report.to_json()))["version"] == 1


def test_streams_are_consecutive_parts_each_from_the_beginning(byte_model: Path, text_file: Path) -> None:
    report = perplexity(byte_model, text=text_file, streams=3)
    data = text_file.read_bytes()
    parts = [_expected_nats(byte_model, data[at : at + 1000]) for at in (0, 1000, 2000)]
    assert report.nats_per_token == pytest.approx(np.mean(parts), abs=CUT_NATS)
    assert (report.tokens, report.streams) == (3 * 999, 3)


def test_threads_change_rounding_only(byte_model: Path, text_file: Path) -> None:
    single = perplexity(byte_model, text=text_file, tokens=600, threads=1)
    double = perplexity(byte_model, text=text_file, tokens=600, threads=2)
    torch.set_num_threads(1)
    assert double.nats_per_token == pytest.approx(single.nats_per_token, abs=CUT_NATS)


def test_bytes_that_are_not_utf8_are_fine_for_a_byte_level_model(byte_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(range(256)) * 2)
    assert perplexity(byte_model, text=path).tokens == 511


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --text"),
        ({"text": Text.of("short", b"a")}, "too few"),
        ({"text": Text.of("short", b"abcdef"), "streams": 4}, "too few"),
        ({"text": Text.of("some", b"abcdef"), "streams": 0}, "0 streams"),
        ({"text": Text.of("some", b"abcdef"), "tokens": 1}, "1 tokens are too few"),
        ({"text": Text.of("some", b"abcdef"), "activations": "int7"}, "has no int7 activations"),
        ({"text": Text.of("some", b"abcdef"), "threads": 0}, "0 threads"),
        ({"text": "nowhere.txt"}, "cannot be read"),
    ],
)
def test_bad_input_is_one_line(byte_model: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        perplexity(byte_model, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
