# SPDX-License-Identifier: Apache-2.0
"""Losses over bits as a picture: an SVG with a logarithmic axis of KL. The same figures give the same bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mossquant.calibration.sensitivity import Sensitivities
from mossquant.errors import InputError
from mossquant.files.outputs import new_file
from mossquant.plan.plan import Plan

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 460, 76, 190, 40, 56
_COLOURS = (
    "#0b6e99",
    "#c2410c",
    "#15803d",
    "#7c3aed",
    "#b91c1c",
    "#a16207",
    "#0f766e",
    "#be185d",
    "#475569",
    "#4d7c0f",
)
_PADDING = 0.05
"""Free room beside the outermost points, as a share of the axis."""


@dataclass(frozen=True)
class Series:
    """Points (x, y > 0) in the order of x; joined by a line, or single marks."""

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True


def frontier_chart(plan: Plan) -> tuple[str, list[Series]]:
    """The frontier that a plan was chosen from, what was promised, and what was measured.

    Raises:
        InputError: formats were not chosen by losses on text.
    """
    calibrated = plan.calibrated
    if calibrated is None or not calibrated.frontier:
        raise InputError("there is no frontier to draw: formats were not chosen by what they lose on text; give --text")
    bits = 8 / plan.parameters
    series = [Series("predicted frontier", tuple((point.bytes * bits, point.kl) for point in calibrated.frontier))]
    here = plan.bits_per_weight
    if calibrated.predicted_kl is not None:
        series.append(Series(f"predicted, {calibrated.budget}", ((here, calibrated.predicted_kl),), joined=False))
    if calibrated.rounded_kl is not None:
        series.append(Series("measured after rounding", ((here, calibrated.rounded_kl),), joined=False))
    if calibrated.recovered_tokens and calibrated.kl is not None:
        series.append(Series("measured after recovery", ((here, calibrated.kl),), joined=False))
    return f"{plan.recipe}: KL over bits a weight", series


def sensitivity_chart(found: Sensitivities) -> tuple[str, list[Series]]:
    """For each role, KL with all of its layers in a format over the bits a weight that these then take."""
    sums: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    for group in found.groups:
        if group.expert is None:
            counts[group.role] = counts.get(group.role, 0) + group.weights
            for loss in group.losses:
                own = sums.setdefault(group.role, {}).setdefault(loss.storage, [0.0, 0.0])
                own[0], own[1] = own[0] + loss.bytes, own[1] + loss.kl
    series = []
    for role, storages in sums.items():
        points = sorted((8 * size / counts[role], kl) for size, kl in storages.values())
        series.append(Series(role, tuple(points)))
    return f"KL of each role over its bits a weight ({found.method})", series


def write_chart(title: str, series: Sequence[Series], path: Path, *, x: str = "bits a weight") -> None:
    """Write a chart of KL over `x`; points of KL 0 lie beyond a logarithmic axis and are left out.

    Replaces an .svg that is there.

    Raises:
        InputError: another kind of file, or nothing to draw.
    """
    if path.suffix != ".svg":
        raise InputError(f"{path}: a picture is an .svg file; choose such a name")
    drawn = [Series(one.name, tuple(point for point in one.points if point[1] > 0), one.joined) for one in series]
    drawn = [one for one in drawn if one.points]
    xs = [point[0] for one in drawn for point in one.points]
    ys = [math.log10(point[1]) for one in drawn for point in one.points]
    if not xs:
        raise InputError(f"{path}: nothing was lost anywhere, so there is nothing to draw")
    text = "\n".join(_lines(title, x, drawn, _Axis.over(xs), _Axis.over(ys)))
    with new_file(path, force=True) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "_Axis":
        room = _PADDING * (max(values) - min(values)) or 0.5
        return cls(min(values) - room, max(values) + room)

    def place(self, value: float, first: float, last: float) -> float:
        return round(first + (value - self.low) / (self.high - self.low) * (last - first), 1)


def _lines(title: str, x_name: str, series: Sequence[Series], x_axis: _Axis, y_axis: _Axis) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x_of(x: float) -> float:
        return x_axis.place(x, _LEFT, right)

    def y_of(y: float) -> float:
        return y_axis.place(math.log10(y), bottom, _TOP)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#1f2328"><title>{escape(title)}</title>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="16" y="{(_TOP + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(_TOP + bottom) / 2})">KL, nats a token</text>',
    ]
    for exponent in range(math.ceil(y_axis.low), math.floor(y_axis.high) + 1):
        y = y_axis.place(exponent, bottom, _TOP)
        lines.append(f'<path d="M{_LEFT} {y}H{right}" stroke="#d0d7de"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">1e{exponent}</text>')
    for bits in range(math.ceil(x_axis.low), math.floor(x_axis.high) + 1):
        x = x_of(bits)
        lines.append(f'<path d="M{x} {_TOP}V{bottom}" stroke="#eaeef2"/>')
        lines.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{bits}</text>')
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(x_of(x), y_of(y)) for x, y in one.points]
        if one.joined and len(places) > 1:
            path = "L".join(f"{x} {y}" for x, y in places)
            lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        size = 2.5 if one.joined else 5
        lines += [f'<circle cx="{x}" cy="{y}" r="{size}" fill="{colour}"/>' for x, y in places]
        y = _TOP + 10 + 18 * number
        lines.append(f'<circle cx="{right + 14}" cy="{y - 4}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{right + 24}" y="{y}">{escape(one.name)}</text>')
    return [*lines, "</svg>"]
