# SPDX-License-Identifier: Apache-2.0
"""Where the time of a pass goes, as libmoss says it and `bench` shows it; and how near it is to what memory gives."""

from lowered import Workshop

from mossquant.eval.bench import bench
from mossquant.eval.report.tables import bandwidth_tables, profile_tables
from mossquant.targets.native.export import host_layout


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
    assert profile_tables(report)[-1] == f"{onnx}: onnx does not say where its time goes"


def test_what_is_read_of_a_mapping(workshop: Workshop) -> None:
    """Of the .moss whose weights lie in the file as this machine's kernels want them, and of no other."""
    other = next(layout for layout in ("x86", "arm", "rows") if layout != host_layout())
    mapped = workshop("wide", "int4", target="native", isa=host_layout()).program
    paths = [
        mapped,
        workshop("wide", "int4", target="native", isa=other).program,
        workshop("wide", target="native").program,
        workshop("wide", "int4", target="onnx").program,
    ]
    report = bench(paths, threads=1, prompt=8, decode=3, repeats=2)
    own, *others = report.artifacts
    assert own.mapped_mb == mapped.stat().st_size / 1e6
    assert own.read_gb_s is not None
    assert own.read_share is not None
    assert 0 < own.read_share.min <= own.read_share.median
    reached = 1e-9 * own.bytes_per_token * own.decode_tok_s.max
    assert own.read_share.max <= reached / own.read_gb_s.min
    assert [(one.mapped_mb, one.read_gb_s, one.read_share) for one in others] == [(None, None, None)] * 3
    assert bandwidth_tables(report)[0].row_count == 1
