# SPDX-License-Identifier: Apache-2.0
"""Where the time of a pass goes, as libmoss says it and `bench` shows it."""

from lowered import Workshop

from mossquant.eval.bench import bench
from mossquant.eval.report.tables import profile_tables


def test_where_the_time_goes(workshop: Workshop) -> None:
    """Parts that the model has, of a runtime that times itself; the others say that they do not."""
    native = workshop("wide", "int4", target="native").program
    onnx = workshop("wide", "int4", target="onnx").program
    report = bench([native, onnx], threads=1, prompt=8, decode=3, repeats=1, profile=True)
    own, other = report.artifacts
    assert {"in_proj", "scan", "w2", "head"} <= own.decode_us.keys()
    assert own.prefill_us.keys() == own.decode_us.keys()
    assert sum(own.decode_us.values()) > 0
    assert not other.decode_us
    assert profile_tables(report)[1] == f"{onnx}: onnx does not say where its time goes"
