# SPDX-License-Identifier: Apache-2.0
"""Timing runs every artifact in a process of its own and reports what the format promises. No speed is asserted."""

import json
from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.eval.bench import Speed, bench
from mossquant.eval.machine import copy_bandwidth, cpu_count, machine, peak_rss_mb
from mossquant.files.outputs import json_bytes


def test_what_the_format_promises(byte_model: Path, other_byte_model: Path, artifact_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    paths = [byte_model, other_byte_model, artifact_folder]
    report = bench(
        paths, threads=1, prompt=8, decode=3, repeats=2, progress=lambda _, done, of: told.append((done, of))
    )
    values = json.loads(json_bytes(report.to_json()))
    assert (values["version"], values["threads"]) == (1, 1)
    assert values["bandwidth_gb_s"] > 0
    assert "cpu" in values["machine"]
    timings = values["artifacts"]
    assert [(timing["path"], timing["kind"]) for timing in timings] == [
        (str(path), kind) for path, kind in zip(paths, ("checkpoint", "checkpoint", "onnx"), strict=True)
    ]
    for timing in timings:
        for speed in (timing["decode_tok_s"], timing["prefill_tok_s"]):
            assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert timing["load_ms"] > 0
        assert timing["peak_rss_mb"] >= timing["idle_rss_mb"] > 10
    assert timings[0]["bytes_per_token"] == 2 * timings[1]["bytes_per_token"] > 0
    assert told[-1] == (9, 9)


def test_median_and_range() -> None:
    assert Speed.of([3.0, 1.0, 2.0]) == Speed(2.0, 1.0, 3.0)


@pytest.mark.parametrize("options", [{"threads": 0}, {"prompt": 0}, {"decode": 0}, {"repeats": 0}])
def test_bad_options(byte_model: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="needs 1 or more"):
        bench([byte_model], **options)


def test_bad_paths(byte_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artifact was given"):
        bench([])
    with pytest.raises(InputError, match="does not exist"):
        bench([byte_model, tmp_path / "nothing"])


def test_a_bad_checkpoint_is_the_users_mistake_and_ends_its_process(byte_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((byte_model / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        bench([broken], threads=1, prompt=1, decode=1, repeats=1)


def test_machine() -> None:
    found = machine()
    assert found["torch"] is not None
    assert 1 <= cpu_count() <= found["cores"]
    assert copy_bandwidth(1) > 0
    assert peak_rss_mb() > 10
