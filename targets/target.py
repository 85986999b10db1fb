# SPDX-License-Identifier: Apache-2.0
"""What a target is: one object that lowers, opens, explains and reads back. Whoever measures asks it and names none.

Each is `TARGET` of `target.py` in the folder of its name, and is imported where it is used: a checkpoint in PyTorch
needs no onnxruntime. Which there are stands in `mossquant.plan.capabilities`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from mossquant.checkpoint.locate import STATISTICS, Located
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import experts_of, parameter_count, tensor_specs
from mossquant.model.tensors import Use, outside_blocks
from mossquant.plan.capabilities import CAPABILITIES, Activations, Capabilities, get_capabilities
from mossquant.progress import Progress
from mossquant.runner import Runner
from mossquant.targets.artifact import ProgramRecord
from mossquant.targets.info_report import InfoReport
from mossquant.targets.weights_report import WeightsReport


@dataclass(frozen=True)
class Exported:
    """What an export wrote: its entry of the manifest, and notes for the user, one line each."""

    program: ProgramRecord
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What an export will do.

    Attributes:
        write: writes the program and what lies beside it, but the tokenizer and the manifest, into a folder.
        disk_bytes: room that this takes.
        memory_bytes: anonymous memory that it takes, beside the interpreter's own with its imports.
    """

    write: Callable[[Path], Exported]
    disk_bytes: int
    memory_bytes: int


class Target:
    """One target. Its folder has a module for each of these, which is imported when asked for.

        export.prepare    runner.open_runner    open.open_to_run    info.info    read_back.read_back

    Args:
        name: of its folder, and in the capabilities.
        runtime: the package, or the library, that runs what it lowers to.
        computes_all: kinds of block ("ssm", "mlp") of which it computes every expert at every token.
        options: its own options of `export`, and the values of each, the default first.
    """

    def __init__(
        self,
        name: str,
        *,
        runtime: str,
        computes_all: Collection[str] = (),
        options: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.name, self.runtime, self._computes_all, self.options = name, runtime, computes_all, options or {}

    def prepare(
        self,
        weights: Weights,
        *,
        activations: Activations | None,
        progress: Progress | None,
        options: Mapping[str, str] | None = None,
    ) -> Prepared:
        """Check all that can be checked before lowering weights that the target can hold, and say what it needs.

        Options of other targets are left to them.

        Raises:
            InputError: a package is missing, or the target does not have these activations.
        """
        given = options or {}
        own = {name: value for name, value in given.items() if self.choices(name, given)}
        prepared: Prepared = self._module("export").prepare(weights, activations=activations, progress=progress, **own)
        return prepared

    def choices(self, option: str, given: Mapping[str, str]) -> Sequence[str]:
        """The values of an option of `export`, the default first; none where it has none, with those that are given."""
        return self.options.get(option, ())

    def capabilities(self, given: Mapping[str, str]) -> Capabilities:
        """What it can hold with the options of `export` that are given."""
        return get_capabilities(self.name)

    def open(self, source: Located | Weights, *, activations: str | None, threads: int | None) -> Runner:
        """Open what it runs. Raises `InputError`: it cannot be opened, or not with these activations."""
        assert isinstance(source, Located), "weights are run by PyTorch"
        runner: Runner = self._module("runner").open_runner(source, threads=threads)
        return runner

    def warm(self, located: Located) -> None:
        """Import the runtime, and do what only a first opening in this process does: what is timed comes after."""
        self._module("open").open_to_run(located.path)

    def profiled(self, runner: Runner, work: Callable[[], None]) -> dict[str, float] | None:
        """Seconds of each part of the model in what work() runs on a Runner of this target; None: nobody can tell."""
        return None

    def mapped(self, runner: Runner) -> Path | None:
        """The file whose mapping the weights of a step are read from; None: they lie elsewhere, or nobody can tell."""
        return None

    def info(self, located: Located) -> InfoReport:
        """Say what is there, running nothing. Raises `InputError`: it is damaged, or not what its manifest says."""
        report: InfoReport = self._module("info").info(located)
        return report

    def read_back(self, weights: Weights, located: Located) -> WeightsReport:
        """Compare every weight in a program with what it was lowered from.

        Raises:
            InputError: the program cannot be read, contradicts the manifest beside it, or is of a model of another
                shape.
        """
        report: WeightsReport = self._module("read_back").read_back(weights, located)
        return report

    def active_share_of(self, runner: Runner) -> float:
        """Share of the parameters that a decode step of a Runner of this target reads."""
        return self.active_share(MossNetConfig.from_json(runner.info.config, where=runner.info.path))

    def active_share(self, config: MossNetConfig) -> float:
        """Share of the parameters that a decode step reads."""
        return active_share(config, computes_all=self._computes_all)

    @property
    def runtime_version(self) -> str | None:
        """The release of its runtime that is installed; None: none."""
        try:
            return version(self.runtime)
        except PackageNotFoundError:
            return None

    def _module(self, name: str) -> ModuleType:
        return import_module(f"mossquant.targets.{self.name}.{name}")


def get_target(name: str) -> Target:
    """The target of a name in the capabilities."""
    target: Target = import_module(f"mossquant.targets.{name}.target").TARGET
    return target


def target_of(located: Located) -> Target:
    """The target that runs what a PATH argument points at: PyTorch for checkpoints. Raises `InputError`: none does."""
    if located.kind == STATISTICS:
        raise InputError(f"{located.given} holds statistics and no model; give a checkpoint or an artifact")
    return get_target(located.kind if located.kind in CAPABILITIES else "torch")


def program_targets() -> tuple[str, ...]:
    """Names of the targets that have programs, and so can be lowered to."""
    return tuple(name for name, known in CAPABILITIES.items() if known.suffix is not None)


def runtimes() -> dict[str, str | None]:
    """What runs what targets lower to, PyTorch first → the release that is installed, None where it is not."""
    targets = map(get_target, CAPABILITIES)
    return {target.runtime: target.runtime_version for target in targets}


def active_share(config: MossNetConfig, *, computes_all: Collection[str] = ()) -> float:
    """Share of the parameters that one token uses: of a layer's experts the chosen ones, of an untied table one row.

    Args:
        config: the model's shape.
        computes_all: kinds of block ("ssm", "mlp") of which a target computes every expert at every token.
    """
    shares = {
        name: experts.chosen / experts.count
        for experts in experts_of(config)
        if experts.kind not in computes_all
        for member in experts.members
        for name in member
    }
    if not config.tie_word_embeddings:
        shares[outside_blocks(tensor_specs(config))[Use.TABLE].name] = 1 / config.vocab_size
    active = sum(shares.get(spec.name, 1.0) * spec.count for spec in tensor_specs(config))
    return active / parameter_count(config)
