# SPDX-License-Identifier: Apache-2.0
"""Routing against its definitions, computed token by token; what is forced is what the original chose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import CUT_NATS, FORMS_FLOAT64, SAME_SUM_FLOAT64
from commands import refused
from small import CONFIGS, SMALL, random_model, write_model

from mossquant.errors import InputError
from mossquant.eval.compare import ComparisonReport, compare
from mossquant.eval.routing import RoutingShift, compare_routing
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.model.routing import Routing
from mossquant.runner import Tokens
from mossquant.targets.torch import runner as module
from mossquant.targets.torch.runner import TorchRunner

BYTES = replace(SMALL, vocab_size=256)


def _runner(folder: Path, change: Callable[[MossNet], None] = lambda model: None) -> TorchRunner:
    model = random_model(BYTES)
    change(model)
    return TorchRunner.open(write_model(folder, model), dtype=torch.float64)


def _all(model: MossNet) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def _routers(model: MossNet) -> None:
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if name.endswith("router"):
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)


def _passage(streams: int, length: int) -> Tokens:
    return np.random.default_rng(1).integers(0, 256, (streams, length))


def _one_by_one(original: TorchRunner, candidate: TorchRunner, tokens: Tokens) -> RoutingShift:
    """The same figures with nothing in lockstep: whole passes, experts as sets, tokens one by one."""
    read = torch.from_numpy(tokens[:, :-1])
    seen: list[dict[str, Routing]] = []

    def run(runner: TorchRunner, change: Callable[[str, Routing], Routing] | None = None) -> torch.Tensor:
        shown: dict[str, Routing] = {}

        def reroute(name: str, routing: Routing) -> Routing:
            shown[name] = routing
            return routing if change is None else change(name, routing)

        logits, _ = runner.model(read, run=Forward(scan="sequential", reroute=reroute))
        seen.append(shown)
        return torch.log_softmax(logits, -1)

    p, q = run(original), run(candidate)
    theirs, own = seen

    def chosen(name: str, routing: Routing) -> Routing:
        assert routing.logits is not None
        kept = torch.full_like(routing.logits, -torch.inf)
        for row, experts in enumerate(theirs[name].chosen.tolist()):
            kept[row, experts] = routing.logits[row, experts]
        return replace(routing, chosen=theirs[name].chosen, gates=kept.softmax(-1).gather(1, theirs[name].chosen))

    forced = [run(candidate, chosen), run(candidate, lambda name, routing: theirs[name])]
    kl = [float((p.exp() * (p - values)).sum(-1).mean()) for values in (q, *forced)]
    figures = {}
    for name in theirs:
        sets = [[set(row) for row in side[name].chosen.tolist()] for side in (theirs, own)]
        gates = [
            [dict(zip(row, gate, strict=True)) for row, gate in zip(r.chosen.tolist(), r.gates.tolist(), strict=True)]
            for r in (theirs[name], own[name])
        ]
        overlap = np.mean([len(a & b) / len(a) for a, b in zip(*sets, strict=True)])
        moved = np.mean(
            [sum(abs(a.get(e, 0) - b.get(e, 0)) for e in range(4)) / 2 for a, b in zip(*gates, strict=True)]
        )
        loads = [[sum(e in row for row in side) / (2 * len(side)) for e in range(4)] for side in sets]
        figures[name] = overlap, moved, sum(abs(a - b) for a, b in zip(*loads, strict=True)) / 2
    found = compare_routing(original, [candidate], tokens)[0]
    assert [router.name for router in found.routers] == list(figures)
    for router in found.routers:
        values = router.overlap, router.total_variation, router.load_shift
        assert values == pytest.approx(figures[router.name], abs=SAME_SUM_FLOAT64)
    assert [found.kl_mean, found.chosen.kl_mean, found.gates.kl_mean] == pytest.approx(kl, abs=SAME_SUM_FLOAT64)
    assert found.chosen.explained == pytest.approx(1 - kl[1] / kl[0], abs=FORMS_FLOAT64)
    assert found.gates.explained == pytest.approx(1 - kl[2] / kl[0], abs=FORMS_FLOAT64)
    return found


def test_the_figures_are_what_their_definitions_say(tmp_path: Path) -> None:
    original, candidate = _runner(tmp_path / "a"), _runner(tmp_path / "b", _all)
    found = _one_by_one(original, candidate, _passage(2, 31))
    assert [router.kind for router in found.routers] == ["ssm", "mlp", "ssm", "mlp"]
    assert all(router.overlap < 1 and router.total_variation > 0 for router in found.routers)
    mean = found.mean("ssm")
    assert mean is not None
    assert mean.overlap == pytest.approx((found.routers[0].overlap + found.routers[2].overlap) / 2)
    assert found.mean("attention") is None


def test_a_model_against_itself_moves_nothing(tmp_path: Path) -> None:
    original = _runner(tmp_path / "a")
    found = compare_routing(original, [original], _passage(2, 40))[0]
    moved = {(router.overlap, router.total_variation, router.load_shift) for router in found.routers}
    assert moved == {(1.0, 0.0, 0.0)}
    assert (found.kl_mean, found.chosen.kl_mean, found.gates.kl_mean) == (0, 0, 0)
    assert found.chosen.explained is None


def test_where_only_routers_changed_their_gates_explain_all(tmp_path: Path) -> None:
    original, candidate = _runner(tmp_path / "a"), _runner(tmp_path / "b", _routers)
    found = compare_routing(original, [candidate], _passage(2, 600), at_once=2)[0]
    assert found.kl_mean > 1e-3
    assert all(router.overlap < 0.95 and router.load_shift > 0 for router in found.routers)
    assert found.gates == replace(found.gates, kl_mean=0, explained=1)
    assert found.gates.explained_ci95 == (1, 1)
    assert 0 < found.chosen.kl_mean < found.kl_mean
    assert found.chosen.explained_ci95 is not None
    assert found.chosen.explained is not None
    assert found.chosen.explained_ci95.low < found.chosen.explained < found.chosen.explained_ci95.high


def test_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, candidate = _runner(tmp_path / "a"), _runner(tmp_path / "b", _all)
    tokens = _passage(3, 50)
    whole = compare_routing(original, [candidate], tokens)[0]
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 24)
    monkeypatch.setattr("mossquant.eval.scores.PIECE", 19)
    cut = compare_routing(original, [candidate], tokens)[0]
    assert cut.chosen.kl_mean == pytest.approx(whole.chosen.kl_mean, abs=SAME_SUM_FLOAT64)
    for one, other in zip(whole.routers, cut.routers, strict=True):
        assert other.overlap == pytest.approx(one.overlap)
        assert other.load_shift == pytest.approx(one.load_shift)


def test_the_report_holds_it(byte_model: Path, other_byte_model: Path, text_file: Path) -> None:
    report = compare(byte_model, [other_byte_model, byte_model], text=text_file, tokens=800, routing=True)
    assert report.routing is not None
    first, same = report.routing
    assert (first.path, same.path) == (str(other_byte_model), str(byte_model))
    assert first.kl_mean == pytest.approx(report.candidates[0].kl_mean, abs=CUT_NATS)
    assert report.to_json()["routing"][1]["routers"][0]["overlap"] == 1
    assert ComparisonReport.from_json(report.to_json()).routing == report.routing
    assert compare(byte_model, [byte_model], text=text_file, tokens=100).to_json()["routing"] is None


def test_what_has_no_routing_to_compare(byte_model: Path, tmp_path: Path) -> None:
    plain = write_model(tmp_path / "mamba", random_model(replace(CONFIGS["mamba"], vocab_size=256)))
    with pytest.raises(InputError, match="no routers"):
        compare(plain, [plain], routing=True)
    other = write_model(tmp_path / "pruned", random_model(replace(CONFIGS["pruned"], vocab_size=256)))
    with pytest.raises(InputError, match="other experts than those of"):
        compare(byte_model, [other], routing=True)


@pytest.mark.parametrize("suffix", [".onnx", ".pte", ".moss"])
def test_artifacts_are_refused(byte_model: Path, tmp_path: Path, suffix: str) -> None:
    program = tmp_path / f"model{suffix}"
    program.write_bytes(b"program")
    said = refused(tmp_path, "compare", byte_model, program, "--routing")
    assert "routing is compared between PyTorch models" in said
    assert str(program) in said
