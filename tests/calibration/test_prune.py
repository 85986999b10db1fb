# SPDX-License-Identifier: Apache-2.0
"""Pruning: what goes is what loses least, what is left is an ordinary model, and what cannot be done is said first."""

import json
import os
import signal
from itertools import count
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from commands import command, die_at, forked, refused
from small import CONFIGS, SMALL, difference, random_model, random_tokens, write_model

from mossquant.calibration.meter import Meter
from mossquant.calibration.prune import By, Kind, Pruning, prune
from mossquant.calibration.quantize import quantize
from mossquant.calibration.recover import Rates
from mossquant.checkpoint.checkpoint import load_model, write_checkpoint
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.pruned import Keep, Pruned
from mossquant.errors import InputError
from mossquant.eval.verify import verify
from mossquant.files.outputs import file_sha256
from mossquant.model.mossnet import experts_of, tensor_specs
from mossquant.progress import Progress
from mossquant.targets.export import export
from mossquant.text.text import Text

TOKENS = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("prune") / "model", random_model(SMALL, dtype=torch.float32))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, SMALL.vocab_size, 2 * TOKENS))
    return Text.from_ids(path)


@pytest.mark.parametrize("kind", ["ssm", "mlp"])
def test_greedily_the_best_pair_of_the_best_first(model: Path, text: Text, kind: Kind, tmp_path: Path) -> None:
    """Against every choice measured: first the expert that loses least, then the one that adds least to it."""
    found = prune(model, tmp_path / "out", experts=0.25, kind=kind, text=[text], tokens=TOKENS)
    weights = open_weights(model, verb="test")
    # What it looks at: its text less the quarter that it is judged on.
    tokens = torch.from_numpy(np.asarray(text.ids)[: 3 * TOKENS // 2])
    windows = torch.stack([tokens[:256], tokens[512:768]])
    meter = Meter(weights, windows)
    every = [
        (experts.routing or "", experts.layer, number)
        for experts in experts_of(SMALL)
        if experts.kind == kind
        for number in range(experts.count)
    ]

    def lost(*gone: tuple[str, int, int]) -> float:
        by_router: dict[str, list[int]] = {}
        for routing, _, number in gone:
            by_router.setdefault(routing, []).append(number)
        return float(meter.kl(gone=by_router).mean())

    first = min(every, key=lost)
    second = min((other for other in every if other != first), key=lambda other: lost(first, other))
    assert [(one.layer, one.expert) for one in found.removed] == [(of[1], of[2]) for of in (first, second)]
    assert found.removed[0].alone == pytest.approx(lost(first), rel=1e-5)
    assert found.experts[kind] == (8, 6)


@pytest.mark.parametrize("by", ["random", "frequency", "reap", "change", "leave-one-out"])
def test_each_saliency_takes_its_smallest(model: Path, text: Text, by: By, tmp_path: Path) -> None:
    options = {"experts": 0.5, "kind": "mlp", "text": [text], "tokens": TOKENS}
    found = prune(model, tmp_path / "out", by=by, **options)  # type: ignore[arg-type]
    again = prune(model, tmp_path / "again", by=by, **options)  # type: ignore[arg-type]
    assert file_sha256(tmp_path / "out" / "model.safetensors") == file_sha256(tmp_path / "again" / "model.safetensors")
    assert found.removed == again.removed
    # The floor: each layer keeps as many as a token chooses.
    assert [len(layer) for layer in found.keep["mlp"]] == [2, 2]
    if by != "random":
        of = {"leave-one-out": "alone"}.get(by, by)
        scores = [getattr(one, of) for one in found.removed]
        assert scores == sorted(scores)


@pytest.mark.parametrize("targets", [("onnx", "native"), pytest.param(("executorch",), marks=pytest.mark.slow)])
def test_named_experts_go_and_every_target_takes_what_is_left(
    targets: tuple[str, ...], checkpoint_folder: Path, tmp_path: Path
) -> None:
    """One SSM expert left in a layer, an MLP at top-k, counts that differ: quantized, lowered, verified."""
    kept = Keep(ssm=((0, 1, 3), (2,)), mlp=((0, 3), (0, 1, 2)))
    (tmp_path / "keep.json").write_text(json.dumps({"ssm": kept.ssm, "mlp": kept.mlp}))
    (tmp_path / "book.txt").write_text("The router decides, and the state remembers what it was told. " * 40)
    words = ("--keep", tmp_path / "keep.json", "--text", tmp_path / "book.txt", "--tokens", TOKENS)
    assert command("prune", checkpoint_folder, "-o", tmp_path / "out", *words).status == 0
    left = open_weights(tmp_path / "out", verb="test")
    expected = Pruned(open_weights(checkpoint_folder, verb="test"), kept)
    assert left.config == expected.config
    assert all(torch.equal(left.kept(name), expected.kept(name)) for name in expected.specs)
    assert file_sha256(tmp_path / "book.txt") in left.origin.seen_text
    quantize(tmp_path / "out", tmp_path / "int4", recipe="int4-uniform")
    (tmp_path / "other.txt").write_text("What nobody has seen is what a model is judged by. " * 10)
    for target in targets:
        export(tmp_path / "int4", tmp_path / target, target=target)
    lowered = [tmp_path / target for target in targets]
    assert verify(tmp_path / "int4", lowered, text=tmp_path / "other.txt", positions=64, stream=128).passed


def test_what_is_never_chosen_costs_nothing(text: Text, tmp_path: Path) -> None:
    model = random_model(SMALL, dtype=torch.float32)
    for block in model.blocks:
        block.router.zero_()  # of equal logits always the same two are chosen
    write_model(tmp_path / "model", model)
    found = prune(tmp_path / "model", tmp_path / "out", experts=0.5, kind="both", text=[text], tokens=TOKENS)
    assert all(one.frequency == 0 for one in found.removed)
    assert [len(numbers) for layers in found.keep.values() for numbers in layers] == [2, 2, 2, 2]
    assert found.kl < 1e-9
    tokens = random_tokens(SMALL, 1, 30)
    models = [load_model(open_weights(tmp_path / name, verb="test")) for name in ("model", "out")]
    logits = [of(tokens)[0] for of in models]
    assert difference(*logits) < bounds.ONNX_FP32 / 10


def test_recovery_lowers_what_was_lost(model: Path, text: Text, tmp_path: Path) -> None:
    """Judged on the quarter of the text that it did not learn from."""
    found = prune(model, tmp_path / "out", experts=0.25, kind="mlp", text=[text], tokens=TOKENS, recover=24 * 1024)
    assert found.recovered_tokens == 24 * 1024
    assert found.recovered_kl is not None
    assert found.recovered_kl < 0.9 * found.kl
    assert open_weights(tmp_path / "out", verb="test").config.num_mlp_experts != SMALL.num_mlp_experts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_killed_run_goes_on(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(1024) % SMALL.vocab_size)
    place = tmp_path / "place"
    place.mkdir()
    text = Text.from_ids(tmp_path / "ids.npy")
    prune(model, tmp_path / "whole", experts=0.25, text=[text], tokens=TOKENS)

    def run() -> None:
        prune(model, place / "out", experts=0.25, text=[text], tokens=TOKENS)

    whole = file_sha256(tmp_path / "whole" / "model.safetensors")
    # Some of the operations of the file system, from the first measure to the last rename.
    for operation in count(5, 17):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            die_at(operation, place)()
            run()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
    assert operation > 50
    assert file_sha256(place / "out" / "model.safetensors") == whole
    assert [path.name for path in place.iterdir()] == ["out"]
    assert forked("recipes", before=lambda: None) == 0


def test_killed_while_it_recovers_it_gives_the_same_bytes(
    model: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a snapshot and after; the last run goes on from there."""
    every = 10
    monkeypatch.setattr("mossquant.calibration.recover.EVERY", every)
    kept = Keep(ssm=tuple((0, 1, 3) for _ in range(2)), mlp=tuple((0, 2, 3) for _ in range(2)))
    steps, window, place = 3 * every, Rates().window, tmp_path / "place"
    place.mkdir()
    snapshot = place / "out.recovering.safetensors"

    def run(output: Path, progress: Progress | None = None) -> Pruning:
        options = {"keep": kept, "text": [text], "tokens": TOKENS, "recover": steps * window}
        return prune(model, output, progress=progress, **options)  # type: ignore[arg-type]

    found = run(tmp_path / "whole")
    assert found.recovered_kl is not None, "what was distilled should have been stored"
    for last in (every - 1, every + 2):

        def killed(name: str, done: int, total: int, last: int = last) -> None:
            if name == "recovering" and done == last * window:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            run(place / "out", killed)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not (place / "out").exists()
        assert snapshot.exists() == (last > every)
    gone_on: list[int] = []
    run(place / "out", lambda name, done, total: gone_on.append(done) if name == "recovering" else None)
    assert gone_on[0] == (every + 1) * window
    assert [path.name for path in place.iterdir()] == ["out"]
    whole = {path.name: file_sha256(path) for path in (tmp_path / "whole").iterdir()}
    assert {path.name: file_sha256(path) for path in (place / "out").iterdir()} == whole


@pytest.mark.parametrize(("words", "said"), [
    (["--experts", "25%", "--keep", "keep.json"], "the experts that stay, so --experts chooses nothing; leave one"),
    ([], "say what is to go with --experts 25%, or what is to stay"),
    (["--keep", "keep.json", "--kind", "mlp"], "--keep names the experts that stay, so --kind and --by choose nothing"),
    (["--experts", "25%", "--seed", "1"], "--seed is of --by random, and nothing else is drawn"),
    (["--experts", "many"], "--experts 'many' is not a percentage"),
    (["--experts", "100%"], "100% of the experts cannot be removed"),
    (["--experts", "1%"], "1.0% of"),
    (["--experts", "75%"], "12 of 16 ssm experts cannot go"),
])  # fmt: skip
def test_refused_before_any_work(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(tmp_path, "prune", "tiny", "-o", "out", *words)


def test_other_models_are_refused(model: Path, text: Text, tmp_path: Path) -> None:
    mamba = write_model(tmp_path / "mamba", random_model(CONFIGS["mamba"]))
    with pytest.raises(InputError, match="has no router of ssm experts"):
        prune(mamba, tmp_path / "out", experts=0.25, text=[text])
    quantize(model, tmp_path / "int4", recipe="int4-uniform")
    with pytest.raises(InputError, match="is of kind 'quantized checkpoint', but prune needs: checkpoint"):
        prune(tmp_path / "int4", tmp_path / "out", experts=0.25, text=[text])
    (tmp_path / "out.pruning.json").write_text('{"run": "another", "trials": {}}')
    with pytest.raises(InputError, match="belongs to another model, text, release or options"):
        prune(model, tmp_path / "out", experts=0.25, text=[text])


def test_the_command_line(tmp_path: Path) -> None:
    """The bundled model as its help says, with little text."""
    outcome = command(
        *("prune", "tiny", "--experts", "12.5%", "--by", "change", "--tokens", "512", "--threads", "1"),
        *("-o", tmp_path / "out", "--json", tmp_path / "out.json"),
    )
    assert outcome.status == 0, outcome.err
    assert "ssm experts" in outcome.out
    assert "14 of 16 are left" in outcome.out
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["removed"]) == 2
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_model_of_mixed_types_stays_as_it_is(tmp_path: Path, text: Text) -> None:
    """Some tensors in fp32 beside bf16: every value and type is that of the whole model."""
    model = random_model(SMALL, dtype=torch.float32)
    values = {spec.name: model.parameter_of(spec) for spec in tensor_specs(SMALL)}
    mixed = {name: torch.float32 for name in values if name.endswith("A_log")}
    whole, keep = tmp_path / "model", Keep(mlp=((0, 1), (0, 1, 2)))
    whole.mkdir()
    write_checkpoint(whole, SMALL, lambda spec: values[spec.name], dtype=torch.bfloat16, mixed=mixed)
    found = prune(whole, tmp_path / "out", keep=keep, text=[text], tokens=TOKENS)
    left = open_weights(tmp_path / "out", verb="test")
    expected = Pruned(open_weights(whole, verb="test"), keep)
    assert all(torch.equal(left.kept(name), expected.kept(name)) for name in left.specs)
    assert {left.kept(name).dtype for name in left.specs} == {torch.bfloat16, torch.float32}
    assert found.parameters[1] == left.origin.parameters == expected.origin.parameters
    assert left.origin.payload_bytes == expected.origin.payload_bytes
