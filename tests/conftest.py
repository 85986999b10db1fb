# SPDX-License-Identifier: Apache-2.0
"""One small model for tests of the whole line: two blocks, four experts of each kind, a dt_rank that fills no group."""

import os
from pathlib import Path

import pytest
import torch
from shared import once
from small import random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.model.config import MossNetConfig
from mossquant.targets.export import export

torch.set_num_threads(1)
# pytest-xdist gives its processes the width of a terminal; what commands print is read here.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

TINY = MossNetConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    time_step_rank=12,
    num_ssm_experts=4,
    num_ssm_experts_per_tok=2,
    num_mlp_experts=4,
    num_mlp_experts_per_tok=2,
    mlp_intermediate_size=96,
)


@pytest.fixture(scope="session")
def tiny_config() -> MossNetConfig:
    """The shape of the small model."""
    return TINY


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share; see `shared.once`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint_folder(shared: Path) -> Path:
    """Its checkpoint, in bf16, with routers that decide. Not to be changed: copy it first."""
    model = random_model(TINY, seed=7, dtype=torch.float32)
    return once(shared / "tiny", lambda folder: write_model(folder, model, dtype=torch.bfloat16))


@pytest.fixture(scope="session")
def quantized_folder(checkpoint_folder: Path) -> Path:
    """What recipe int4 makes of it. Not to be changed."""
    folder = checkpoint_folder.with_name("tiny-int4")
    return once(folder, lambda made: quantize(checkpoint_folder, made, recipe="int4-uniform"))


@pytest.fixture(scope="session")
def artifact_folder(quantized_folder: Path) -> Path:
    """The .onnx of that, with int8 activations. Not to be changed."""
    folder = quantized_folder.with_name("tiny-int4-onnx")
    return once(folder, lambda made: export(quantized_folder, made))


@pytest.fixture(scope="session")
def pte_folder(quantized_folder: Path) -> Path:
    """The .pte of that. Not to be changed."""
    folder = quantized_folder.with_name("tiny-int4-executorch")
    return once(folder, lambda made: export(quantized_folder, made, target="executorch"))


@pytest.fixture(scope="session")
def own_kernels_folder(quantized_folder: Path) -> Path:
    """The .pte of that with kernels of ours. Not to be changed."""
    folder = quantized_folder.with_name("tiny-int4-executorch-own")
    return once(folder, lambda made: export(quantized_folder, made, target="executorch", kernels="mossquant"))


@pytest.fixture(scope="session")
def moss_folder(quantized_folder: Path) -> Path:
    """The .moss of that. Not to be changed."""
    folder = quantized_folder.with_name("tiny-int4-native")
    return once(folder, lambda made: export(quantized_folder, made, target="native"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,320 bytes of text, with characters of several bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(("The quick brown fox – größer als zuvor – jumps over the lazy dog. " * 60).encode())
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where commands write; their input lies elsewhere, so that whatever appears here was left behind."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder
