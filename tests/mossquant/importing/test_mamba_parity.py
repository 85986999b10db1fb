# SPDX-License-Identifier: Apache-2.0
"""Logits of imported Mambas against `transformers` with the same random weights: prompt and token by token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from mambas import SIZES, hugging_face, save_hugging_face, save_original
from small import difference
from torch import Tensor
from transformers import MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from mossquant.checkpoint.checkpoint import Checkpoint, load_model
from mossquant.importing.mamba import import_mamba
from mossquant.model.mossnet import MossNet

SMALL_SIZES = [name for name in SIZES if not name.startswith("768")]


@pytest.fixture
def without_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` computes the norm, A, Δ's bias, B, x and D in fp32, whatever the model's type: lift that."""

    def norm(self: Any, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return torch.mul(hidden * scale, self.weight)

    monkeypatch.setattr(modeling_mamba.MambaRMSNorm, "forward", norm)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def logits_of_both(model: MambaForCausalLM, ours: MossNet) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, theirs, ours) for a prompt of 37 tokens, and token by token after 20 of them."""
    tokens = torch.randint(104, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        yield "prompt", model(tokens).logits, ours(tokens)[0]
        out = model(tokens[:, :20], use_cache=True)
        _, state = ours(tokens[:, :20])
        for t in range(20, 37):
            out = model(tokens[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            logits, state = ours(tokens[:, t : t + 1], state)
            yield f"token {t}", out.logits, logits


@pytest.mark.parametrize("name", SIZES)
def test_logits_equal_transformers_in_fp32(name: str, tmp_path: Path) -> None:
    model = hugging_face(*SIZES[name])
    import_mamba(save_hugging_face(model, tmp_path / "hf"), tmp_path / "out")
    ours = load_model(Checkpoint.open(tmp_path / "out"))
    for what, theirs, found in logits_of_both(model, ours):
        assert float(theirs.std()) > 0.3
        assert difference(theirs, found) < bounds.TRANSFORMERS_FLOAT32, what


def in_float64(name: str, deviation: float, folder: Path) -> tuple[MambaForCausalLM, MossNet]:
    sizes, _ = SIZES[name]
    model = hugging_face({**sizes, "residual_in_fp32": False}, deviation)
    import_mamba(save_hugging_face(model, folder / "hf"), folder / "out")
    return model.double(), load_model(Checkpoint.open(folder / "out"), dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_logits_equal_transformers_in_float64(name: str, tmp_path: Path) -> None:
    """Logits up to 3, where one fp32 rounding of its norm (1e-7 of the logit) leaves room for the others."""
    for what, theirs, found in logits_of_both(*in_float64(name, 0.01, tmp_path)):
        assert difference(theirs, found) < bounds.TRANSFORMERS_FLOAT64, what


@pytest.mark.parametrize("name", SMALL_SIZES)
def test_logits_equal_transformers_without_its_casts_to_fp32(name: str, tmp_path: Path, without_casts: None) -> None:
    for what, theirs, found in logits_of_both(*in_float64(name, SIZES[name][1], tmp_path)):
        assert difference(theirs, found) < bounds.TRANSFORMERS_WITHOUT_CASTS, what


@pytest.mark.parametrize("name", ["48 tied", "96 untied", "odd sizes", "no conv bias"])
def test_both_layouts_give_the_same_checkpoint(name: str, tmp_path: Path) -> None:
    model = hugging_face({**SIZES[name][0], "layer_norm_epsilon": 1e-5})
    one = import_mamba(save_hugging_face(model, tmp_path / "hf"), tmp_path / "one")
    two = import_mamba(save_original(model, tmp_path / "original"), tmp_path / "two")
    assert (one.layout, two.layout) == ("Hugging Face", "state-spaces")
    assert one.config == two.config == Checkpoint.open(tmp_path / "two").config
    assert two.config.vocab_size == 104, "the padding of the vocabulary is kept"
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert any("zeros are stored" in note for note in one.notes) == (name == "no conv bias")
