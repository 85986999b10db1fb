# SPDX-License-Identifier: Apache-2.0
"""Pictures of frontiers and sensitivities, from a model that is measured, chosen for and written."""

import re
from pathlib import Path

import numpy as np
import pytest
from commands import command
from small import CONFIGS, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.calibration.sensitivity import sensitivity
from mossquant.errors import InputError
from mossquant.eval.report.chart import Series, frontier_chart, sensitivity_chart, write_chart
from mossquant.text.text import Text


def places(svg: str, colour: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<circle cx="([\d.]+)" cy="([\d.]+)" r="(?:2.5|5)" fill="{colour}"/>', svg)
    return [(float(x), float(y)) for x, y in found]


def test_points_lie_where_their_figures_say(tmp_path: Path) -> None:
    points = ((4.0, 1e-2), (5.0, 1e-3), (6.0, 1e-4), (16.0, 0.0))
    write_chart("a < b", [Series("one", points)], tmp_path / "chart.svg")
    svg = (tmp_path / "chart.svg").read_text()
    assert "a &lt; b" in svg
    drawn = places(svg, "#0b6e99")
    assert len(drawn) == 3, "KL of 0 is no point of a logarithmic axis"
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 < y1 < y2
    write_chart("a < b", [Series("one", points)], tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was lost"):
        write_chart("", [Series("one", ((4.0, 0.0),))], tmp_path / "chart.svg")
    with pytest.raises(InputError, match=r"is an \.svg file"):
        write_chart("", [Series("one", ((4.0, 1.0),))], tmp_path / "chart.png")
    assert not list(tmp_path.iterdir())


def test_a_measured_model_is_shown_as_tables_and_pictures(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", random_model(CONFIGS["experts"]))
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 53, 600))
    text = [Text.from_ids(tmp_path / "ids.npy")]
    found = sensitivity(model, tmp_path / "s.json", text=text, recipes=["int4"], tokens=256)
    _, roles = sensitivity_chart(found)
    assert {series.name for series in roles} == {group.role for group in found.groups}
    assert all(len(series.points) > 0 for series in roles)
    ran = command("info", tmp_path / "s.json", "--picture", tmp_path / "s.svg")
    assert ran.status == 0, ran.err
    assert "layers.0 ssm.in_proj" in ran.out
    assert (tmp_path / "s.svg").read_text().startswith("<svg")
    with pytest.raises(InputError, match="no frontier"):
        frontier_chart(quantize(model, tmp_path / "plain", recipe="int4-uniform"))
    ledger = quantize(model, tmp_path / "out", budget="12bpw", sensitivities=found, text=text)
    title, (frontier, predicted, measured) = frontier_chart(ledger)
    assert "int4" in title
    assert [x for x, _ in frontier.points] == sorted(x for x, _ in frontier.points)
    assert predicted.points[0][0] == measured.points[0][0] == ledger.bits_per_weight
    ran = command("info", tmp_path / "out", "--picture", tmp_path / "frontier.svg")
    assert ran.status == 0, ran.err
    assert "predicted frontier" in (tmp_path / "frontier.svg").read_text()
