# SPDX-License-Identifier: Apache-2.0
"""What a config accepts and what it refuses: each rule, and all offenders at once."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small import CONFIGS, SMALL

from mossquant.errors import InputError
from mossquant.model.config import PRESETS, MossNetConfig, preset, read_config_json
from mossquant.model.mossnet import parameter_count

BASE = SMALL.to_json(torch_dtype="float32")

# name: (keys changed, None to remove one; what the message says)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "mamba"}, "mossquant import"),
    "a newer version": ({"version": 2}, "newer release"),
    "a misspelled key": ({"hiden_size": 20}, "hiden_size: unknown key"),
    "a missing key with a default": ({"num_ssm_experts_per_tok": None}, "num_ssm_experts_per_tok: input should be"),
    "a stored type that is a list": ({"torch_dtype": ["bfloat16"]}, "torch_dtype: input should be"),
    "a string": ({"hidden_size": "20"}, "hidden_size: input should be a valid integer, not '20'"),
    "a truth value": ({"num_hidden_layers": True}, "num_hidden_layers: input should be a valid integer"),
    "a trillion": ({"vocab_size": 10**12}, "vocab_size: input should be less"),
    "a trillion experts": ({"num_ssm_experts": 10**12}, "num_ssm_experts.all layers: input should be less"),
    "no SSM expert": ({"num_ssm_experts": [0, 1]}, "num_ssm_experts has 0"),
    "experts for another number of layers": ({"num_ssm_experts": [2, 2, 2]}, "lists 3 layers, num_hidden_layers is 2"),
    "lists in lists": ({"num_mlp_experts": [[1], [2]]}, "num_mlp_experts.layers.0: input should be"),
    "experts of width 0": ({"mlp_intermediate_size": 0}, "mlp_intermediate_size is 0 though"),
    "too many experts in all": (
        {"num_hidden_layers": 1024, "num_ssm_experts": 1024, "num_mlp_experts": 1024},
        "come to 2097152 over all layers, 8192 is the most",
    ),
    "eps infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps: input should be a finite number"),
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**BASE, **changes}.items() if value is not None}


def checked(config: MossNetConfig) -> MossNetConfig:
    """The config, as it is read back from what is stored."""
    return MossNetConfig.from_json(config.to_json(torch_dtype="float32"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind: str) -> None:
    stored = json.loads(json.dumps(CONFIGS[kind].to_json(torch_dtype="bfloat16")))
    assert MossNetConfig.from_json(stored) == CONFIGS[kind]
    assert checked(CONFIGS[kind]) == CONFIGS[kind]


@pytest.mark.parametrize("rule", REFUSED)
def test_refused(rule: str) -> None:
    changes, message = REFUSED[rule]
    start = time.process_time()
    with pytest.raises(InputError) as error:
        MossNetConfig.from_json(changed(changes), where="here/config.json")
    assert message in str(error.value)
    assert str(error.value).startswith("here/config.json")
    assert "\n" not in str(error.value)
    assert time.process_time() - start < 1, "nothing is built before it is refused"


def test_all_offenders_at_once() -> None:
    changes = {"typo": 1, "expand": 0, "num_mlp_experts": -1, "torch_dtype": "x", "vocab_size": None}
    with pytest.raises(InputError) as error:
        MossNetConfig.from_json(changed(changes))
    assert all(f"{key}" in str(error.value) for key in changes)


def test_where_fewer_experts_are_left_all_are_chosen() -> None:
    config = replace(SMALL, num_ssm_experts=(1, 4), num_mlp_experts=(0, 2), num_mlp_experts_per_tok=3)
    assert [config.ssm_chosen(i) for i in range(2)] == [1, 2]
    assert [config.mlp_chosen(i) for i in range(2)] == [0, 2]
    with pytest.raises(InputError, match="lists 1 layers"):
        checked(replace(config, num_ssm_experts=(1,)))


def test_presets() -> None:
    assert set(PRESETS) == {"tiny", "8x30m", "8x200m", "8x1.5b", "mamba-5m", "mamba-130m", "mamba-370m"}
    assert all(checked(config) == config for config in PRESETS.values())
    tiny = preset("tiny")
    assert 5e6 <= parameter_count(tiny) <= 7e6
    assert tiny.vocab_size == 4096
    assert tiny.time_step_rank % 32 != 0
    assert min(tiny.ssm_experts(0), tiny.mlp_experts(0)) >= 4
    with pytest.raises(InputError, match=r"unknown preset 'tinny'; known presets: tiny, 8x30m, 8x200m, 8x1\.5b"):
        preset("tinny")


def test_the_table_of_presets_in_the_documentation() -> None:
    rows = (Path(__file__).parents[3] / "docs" / "model.md").read_text("utf-8").splitlines()
    for name, config in PRESETS.items():
        sizes = (config.num_hidden_layers, config.hidden_size, config.time_step_rank, config.mlp_intermediate_size)
        cells = (f"`{name}`", f"{parameter_count(config):,}", *sizes, config.vocab_size)
        assert f"| {' | '.join(map(str, cells))} |" in rows


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not JSON"), (b"[1, 2]", "expected a JSON object"), (b" " * (1 << 20) + b"{}", "larger than 1 MB")],
)
def test_unreadable_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_config_json(tmp_path)


def test_paths_that_are_no_checkpoint_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        with pytest.raises(InputError, match="is no checkpoint"):
            read_config_json(path)
