# SPDX-License-Identifier: Apache-2.0
"""Byte-level checkpoints for the tests of measurements: small enough to run in milliseconds, on one thread."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import SMALL, random_model, write_model

BYTES = replace(SMALL, vocab_size=256)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a vocabulary of bytes."""
    return write_model(tmp_path_factory.mktemp("models") / "bytes", random_model(BYTES, seed=0))


@pytest.fixture(scope="session")
def other_byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with its weights in bf16: a candidate that lies near the original."""
    folder = tmp_path_factory.mktemp("models") / "bf16"
    return write_model(folder, random_model(BYTES, seed=0), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 bytes of text, with characters of several bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(("The quick brown fox – größer als zuvor – jumps. " * 100).encode()[:3000])
    return path
