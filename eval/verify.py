# SPDX-License-Identifier: Apache-2.0
"""Hold artifacts against the checkpoint that they were lowered from: every weight in the file, then what it computes.

Weights are read back from the file on disk and compared code for code and scale for scale: nothing was changed on the
way. `mossquant.eval.parity` then runs both side by side; an artifact whose weights differ is not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.eval.parity import STAGES, Check, ParityReport, parity
from mossquant.progress import Progress
from mossquant.targets.target import target_of
from mossquant.targets.weights_report import WeightsReport
from mossquant.text.text import Text


@dataclass(frozen=True)
class ArtifactVerdict:
    """One artifact.

    Attributes:
        path: as given.
        weights: what reading back its weights found.
        parity: what running it found; None where its weights differ, or where only weights were asked for.
    """

    path: str
    weights: WeightsReport
    parity: ParityReport | None

    @property
    def passed(self) -> bool:
        """Whether the weights are the checkpoint's and every check of the run passed."""
        return self.weights.passed and (self.parity is None or self.parity.passed)

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was measured on the run."""
        return () if self.parity is None else self.parity.checks

    def to_json(self) -> dict[str, Any]:
        """An entry of `--json`."""
        return {
            "path": self.path,
            "passed": self.passed,
            "weights": self.weights.to_json(),
            "graph_compared": self.parity is not None,
            "parity": None if self.parity is None else self.parity.to_json(),
        }


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `passed` decides the command's exit status."""

    quantized: str
    artifacts: tuple[ArtifactVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every artifact passed."""
        return all(artifact.passed for artifact in self.artifacts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the text, each once."""
        reports = [artifact.parity for artifact in self.artifacts if artifact.parity is not None]
        return tuple(dict.fromkeys(note for report in reports for note in report.notes))

    def failures(self) -> list[str]:
        """One line for each thing that failed."""
        lines = []
        for artifact in self.artifacts:
            if not artifact.weights.passed:
                lines.append(f"{artifact.path}: {artifact.weights.summary}")
            lines += [
                f"{artifact.path}: {check.name}: {check.value:.3g}, at most {check.bound:.3g} is allowed"
                for check in artifact.checks
                if not check.passed
            ]
        return lines

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        artifacts = [artifact.to_json() for artifact in self.artifacts]
        return {"version": 1, "quantized": self.quantized, "passed": self.passed, "artifacts": artifacts}


def verify(
    quantized: str | Path | Weights,
    artifacts: Sequence[str | Path],
    *,
    weights_only: bool = False,
    text: str | Path | Text | None = None,
    positions: int = 2000,
    stream: int = 20_000,
    threads: int | None = None,
    allow_seen: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Hold artifacts against their checkpoint.

    Args:
        quantized: the quantized checkpoint; the full-precision one for an artifact of that; or weights.
        artifacts: PATH arguments.
        weights_only: compare the weights and run nothing: what the graph computes with them is not compared then.
        text: what to run on; None: the bundled held-out text.
        positions: single steps that are compared.
        stream: tokens that both run freely.
        threads: CPU threads.
        allow_seen: run also on text that the model has seen.
        progress: told each stage that is done, and how many are.

    Raises:
        InputError: bad paths, text or options; an artifact that was lowered from something else.
    """
    if not artifacts:
        raise InputError("no artifact was given; name at least one to hold against the checkpoint")
    stages, done = len(artifacts) * (1 if weights_only else 1 + len(STAGES)), count(1)

    def stage_done(stage: str) -> None:
        if progress is not None:
            progress(stage, next(done), stages)

    weights = open_weights(quantized, verb="verify", check_codes=True)
    verdicts = []
    for path in artifacts:
        located = locate(path)
        read_back = target_of(located).read_back(weights, located)
        stage_done("weights")
        report = None
        if read_back.passed and not weights_only:
            report = parity(
                weights,
                path,
                text=text,
                positions=positions,
                stream=stream,
                threads=threads,
                allow_seen=allow_seen,
                on_stage=stage_done,
            )
        verdicts.append(ArtifactVerdict(str(path), read_back, report))
    return VerifyReport(weights.origin.path, tuple(verdicts))
