# SPDX-License-Identifier: Apache-2.0
"""`moss-costs` says what every linear of a model costs in every format, as `quantize --budget 8ms` reads it."""

import subprocess
from pathlib import Path

from lowered import Workshop

from mossquant import native_path
from mossquant.calibration.costs import Costs
from mossquant.checkpoint.open import open_weights
from mossquant.formats import FORMATS
from mossquant.plan.recipe import STORED


def test_every_linear_in_every_format(workshop: Workshop, tmp_path: Path) -> None:
    lowered = workshop("wide", "int4", target="native")
    said = subprocess.run(
        [str(native_path() / "bin" / "moss-costs"), str(lowered.program), "2"], capture_output=True, check=True
    )
    (tmp_path / "costs.json").write_bytes(said.stdout)
    costs = Costs.read(tmp_path / "costs.json")
    assert costs.threads == 2
    assert 0 < costs.fixed_ns < costs.step_ns
    weights = open_weights(workshop.checkpoint("wide"), verb="test")
    linears = [spec for spec in weights.specs.values() if spec.site is not None]
    for storage in (*FORMATS, STORED):
        assert all(costs.tensors_ns(weights, [spec], storage) > 0 for spec in linears), storage


def test_what_it_cannot_time(tmp_path: Path) -> None:
    program = str(native_path() / "bin" / "moss-costs")
    (tmp_path / "x.moss").write_bytes(b"nothing")
    for words, line in ((["x", "0"], "usage: moss-costs MODEL.moss"), ([str(tmp_path / "x.moss")], "cannot be timed")):
        done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert line in done.stderr
