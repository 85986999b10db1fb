# SPDX-License-Identifier: Apache-2.0
"""What the statistics of `calibrate` predict of a change of weights, against what the change does.

    python bench/perturbations.py [MODEL] [--text FILE…] [--layers 0,3] [--tokens 16384] [--judged 4096]

Predicted: tr(E H Eᵀ) a token, summed over the experts. True: the mean squared change of what the block adds to the
residual stream (of the logits, for the head), a token, and KL at the model's output; on the end of the text, which H
was not made from. A change E of one role in one layer, of all experts at once, is one of

    low, iid, high      Z H^p with p of −½, 0, ½ and Z normal; three draws each
    top                 along the first eigenvector of H alone; three draws
    roundings           W − Q in int4_g32 by `nearest-mse` and `gptq`, as they are

Random ones have half to twice the predicted loss of `nearest-mse`. Prints two Markdown tables: ρ, the rank correlation
of predicted and true over all changes of a role, and true / predicted (geometric mean), that of iid changes as it is,
of others as a part of it: 1 where H knows all. "Coherent": the true loss of iid changes over that of the same changes
with a sign drawn anew for each token, which H can't tell from them: above 1 where errors add up over time.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from mossquant.calibration.calibrate import calibrate
from mossquant.calibration.gptq import GPTQ
from mossquant.calibration.meter import WINDOW, Meter
from mossquant.calibration.nearest import NEAREST_MSE
from mossquant.calibration.solver import Solver
from mossquant.calibration.solver import Statistics as OfTensor
from mossquant.calibration.statistics import Statistics, inputs_of
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.formats import get_format
from mossquant.model.block import Block
from mossquant.model.forward import Forward
from mossquant.model.tensors import TensorSpec
from mossquant.text.text import Text

FORMAT = get_format("int4_g32")
POWERS = {"low": -0.5, "iid": 0.0, "high": 0.5}
TOP = "top"
DRAWS = 3
SOLVERS: tuple[Solver, ...] = (NEAREST_MSE, GPTQ)
SMALLEST = 1e-6
"""Eigenvalues below this part of the largest count as that."""

PLAIN = Forward()

Errors = Mapping[TensorSpec, Tensor]
"""tensor → E of its matrix view."""


@dataclass
class Role:
    """Changes of one role: what was predicted and what was true of each, layers one after the other.

    Attributes:
        kinds: of the changes.
        layers: of the changes.
        losses: [predicted, output, KL] of each.
        coherent: of iid changes, what the block adds, over the same with signs drawn for each token.
    """

    kinds: list[str] = field(default_factory=list)
    layers: list[int | None] = field(default_factory=list)
    losses: list[tuple[float, float, float]] = field(default_factory=list)
    coherent: list[float] = field(default_factory=list)

    def rank_correlation(self, column: int) -> float:
        """Mean over layers."""
        layers, losses = np.array([-1 if at is None else at for at in self.layers]), np.array(self.losses)
        found = [spearmanr(losses[layers == at, 0], losses[layers == at, column]).statistic for at in set(layers)]
        return float(np.mean(found))

    def ratio(self, kind: str, column: int) -> float:
        """True over predicted, geometric mean over the changes of a kind."""
        losses = np.array([of for name, of in zip(self.kinds, self.losses, strict=True) if name == kind])
        return float(np.exp(np.log(losses[:, column] / losses[:, 0]).mean()))


@dataclass(frozen=True)
class Flipped(Forward):
    """A pass in which changes of linears have another sign at each token.

    Attributes:
        errors: tensor's name → E.
        signs: of each of the B · T rows, fp32 [B · T, 1].
    """

    errors: Mapping[str, Tensor] = field(default_factory=dict)
    signs: Tensor = field(default_factory=lambda: torch.ones(1, 1))

    def _product(
        self, x: Tensor, weight: Tensor, names: Sequence[str], rows: Tensor | None, gates: Tensor | None
    ) -> Tensor:
        out = super()._product(x, weight, names, rows, gates)
        if names[0] not in self.errors:
            return out
        signs = self.signs if rows is None else self.signs[rows]
        return out + (signs * F.linear(x.reshape(len(signs), -1), self.errors[names[0]])).view_as(out)


class Truth:
    """What a change does: a model in fp32 and what enters its blocks on windows [W, T]."""

    def __init__(self, weights: Weights, windows: Tensor) -> None:
        self._meter = Meter(weights, windows)
        self._model, self._entering = self._meter.model, dict[int, Tensor]()
        x = self._model.embeddings[windows]
        self._generator = torch.Generator().manual_seed(0)
        self._state = self._model.initial_state(len(windows))
        self._blocks = list(self._model.blocks)
        for number, block in enumerate(self._blocks):
            self._entering[number] = x
            x = self._added(block, x)
        self._hidden = self._model.final_norm(x, Forward()).flatten(0, 1)

    def __call__(self, errors: Errors) -> tuple[float, float]:
        """(mean squared change of what the block adds or of the logits, KL), a token."""
        model, first = self._model, next(iter(errors))
        before = {spec: model.parameter_of(spec).clone() for spec in errors}
        after = {spec: values + first.from_matrix(errors[spec]).float() for spec, values in before.items()}
        kl = float(self._meter.kl(after).mean())
        if first.layer is None:
            change = F.linear(self._hidden, errors[first].float())
            return float(change.square().sum(-1).mean()), kl
        number = next(number for number, block in enumerate(self._blocks) if block.holds(first))
        block, x = self._blocks[number], self._entering[number]
        exact = self._added(block, x)
        for spec, values in after.items():
            model.parameter_of(spec).copy_(values)
        change = self._added(block, x) - exact
        for spec, values in before.items():
            model.parameter_of(spec).copy_(values)
        return float(change.square().sum(-1).mean()), kl

    def flipped(self, errors: Errors) -> float:
        """The first, with a sign drawn for each token."""
        first = next(iter(errors))
        number = next(number for number, block in enumerate(self._blocks) if block.holds(first))
        block, x = self._blocks[number], self._entering[number]
        signs = torch.randint(0, 2, (x.shape[0] * x.shape[1], 1), generator=self._generator) * 2.0 - 1
        run = Flipped(errors={spec.name: error.float() for spec, error in errors.items()}, signs=signs)
        change = self._added(block, x, run) - self._added(block, x)
        return float(change.square().sum(-1).mean())

    def _added(self, block: Block, x: Tensor, run: Forward = PLAIN) -> Tensor:
        return block.added(x, self._state, run)[0]


class Known:
    """What the statistics say of one matrix: H a token, and its spectrum.

    Args:
        matrix: the weights.
        measured: what was measured for it.
        share: Σ g² a token of text.

    Attributes:
        rounded: solver → W − Q.
    """

    def __init__(self, matrix: Tensor, measured: OfTensor, share: float) -> None:
        self._moments: Tensor = measured["hessian"].mean * share
        values, self._vectors = torch.linalg.eigh(self._moments)
        self._values = values.clamp_min(SMALLEST * float(values.max()))
        exact = matrix.float().contiguous()
        self.rounded = {of.name: exact - of.prepare(FORMAT, measured)(exact).dequantize() for of in SOLVERS}

    def predicted(self, error: Tensor) -> float:
        """tr(E H Eᵀ)."""
        error = error.double()
        return float(((error @ self._moments) * error).sum())

    def drawn(self, kind: str, rows: int, generator: torch.Generator) -> Tensor:
        """A random change of so many rows."""
        if kind == TOP:
            return torch.randn((rows, 1), generator=generator, dtype=torch.float64) * self._vectors[:, -1]
        drawn = torch.randn((rows, len(self._values)), generator=generator, dtype=torch.float64)
        return drawn @ (self._vectors * self._values ** POWERS[kind]) @ self._vectors.T


def roles_of(weights: Weights, layers: list[int]) -> dict[tuple[str, int | None], dict[TensorSpec, slice]]:
    """(role, layer) → its tensors with the rows that are changed; parts of a tensor are roles too."""
    found: dict[tuple[str, int | None], dict[TensorSpec, slice]] = {}
    for spec in weights.specs.values():
        if spec.site is None or not (spec.layer is None or spec.layer in layers):
            continue
        found.setdefault((spec.role, spec.layer), {})[spec] = slice(0, spec.matrix_shape[0])
        first = 0
        for part, rows in spec.parts:
            found.setdefault((f"{spec.role} {part}", spec.layer), {})[spec] = slice(first, first + rows)
            first += rows
    return found


def measure(weights: Weights, statistics: Statistics, truth: Truth, layers: list[int]) -> dict[str, Role]:
    """Every change of every role."""
    tokens = max(record.tokens for record in statistics.manifest.inputs)
    read = {name: entry.name for entry in inputs_of(weights.specs.values()) for name in entry.tensors}
    known: dict[str, Known] = {}
    found: dict[str, Role] = {}
    generator = torch.Generator().manual_seed(0)
    for (name, layer), members in roles_of(weights, layers).items():
        for spec in members:
            if spec.name not in known:
                measured, squares = statistics.measured(spec.name), statistics.records[read[spec.name]].squares
                known[spec.name] = Known(spec.to_matrix(weights.kept(spec.name)), measured, squares / tokens)
        role = found.setdefault(name, Role())
        changes = [(of.name, {spec: known[spec.name].rounded[of.name] for spec in members}) for of in SOLVERS]
        for kind in [*POWERS, TOP] * DRAWS:
            drawn = {spec: known[spec.name].drawn(kind, spec.matrix_shape[0], generator) for spec in members}
            changes.append((kind, drawn))
        usual = 0.0
        for kind, whole in changes:
            errors = {spec: only(error, members[spec]) for spec, error in whole.items()}
            predicted = sum(known[spec.name].predicted(error) for spec, error in errors.items())
            if kind == NEAREST_MSE.name:
                usual = predicted
            if kind in (*POWERS, TOP):
                wanted = usual * 2.0 ** float(torch.rand((), generator=generator) * 2 - 1)
                errors = {spec: (wanted / predicted) ** 0.5 * error for spec, error in errors.items()}
                predicted = wanted
            role.kinds.append(kind)
            role.layers.append(layer)
            role.losses.append((predicted, *truth(errors)))
            if kind == "iid" and layer is not None:
                role.coherent.append(role.losses[-1][1] / truth.flipped(errors))
    return found


def only(error: Tensor, rows: slice) -> Tensor:
    """E of these rows, zero elsewhere."""
    kept = torch.zeros_like(error)
    kept[rows] = error[rows]
    return kept


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--text", action="append", type=Path, default=[])
    parser.add_argument("--layers", default="0,3")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--judged", type=int, default=4096)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    weights = open_weights(asked.model, verb="bench")
    text = CalibrationText.of(weights, asked.text)
    learned, judged = text.split(asked.judged)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        given = replace(Text.of(learned.name, learned.tokens.tobytes()), ids=learned.tokens)
        statistics = calibrate(asked.model, Path(place) / "statistics", text=[given], tokens=asked.tokens, threads=1)
        truth = Truth(weights, judged.windows(len(judged) // WINDOW, WINDOW))
        found = measure(weights, statistics, truth, [int(layer) for layer in asked.layers.split(",")])
    others = [kind for kind in [*POWERS, TOP] if kind != "iid"] + [solver.name for solver in SOLVERS]
    for column, what in ((1, "output of the block"), (2, "KL")):
        print(f"\n| {what} | ρ | iid | coherent | {' | '.join(f'{kind}, of iid' for kind in others)} |")
        print("| --- |" + " ---: |" * (3 + len(others)))
        for name, role in found.items():
            iid = role.ratio("iid", column)
            coherent = f"{np.exp(np.log(role.coherent).mean()):.2f}" if role.coherent and column == 1 else "–"
            parts = " | ".join(f"{role.ratio(kind, column) / iid:.2f}" for kind in others)
            print(f"| {name} | {role.rank_correlation(column):.2f} | {iid:.2g} | {coherent} | {parts} |")


if __name__ == "__main__":
    main()
