# SPDX-License-Identifier: Apache-2.0
"""Any PATH argument, or weights, as something that runs, with the tokenizer that belongs to it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mossquant.checkpoint.locate import Located, is_bundled_tokenizer, locate
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.runner import Runner
from mossquant.targets.target import get_target, target_of
from mossquant.text.declared import TEXT_FILE
from mossquant.text.text import Tokenizer


@dataclass(frozen=True)
class OpenModel:
    """A Runner and its tokenizer.

    Attributes:
        runner: what runs.
        folder: where `tokenizer.json` lies, if there is one; None where there is none.
    """

    runner: Runner
    folder: Path | None

    @property
    def path(self) -> str:
        """What was opened, as the user named it."""
        return self.runner.info.path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `InputError` where it takes token ids only, or its tokenizer is not there."""
        info = self.runner.info
        if self.folder is None and info.vocab_size == Tokenizer.byte_level().vocab_size:
            return Tokenizer.byte_level()
        if self.folder is None:
            raise InputError(f"{self.path} has no tokenizer, so the model takes token ids only; give one that has")
        exported = {"tokenizer.json": info.tokenizer_sha256 is not None, TEXT_FILE: info.declares_text}
        for file in (file for file, needed in exported.items() if needed and not (self.folder / file).is_file()):
            name = next(iter(info.files))
            raise InputError(f"{self.folder} has no {file}, and {name} was exported with one: copy it there")
        return Tokenizer.for_folder(self.folder, info.vocab_size)

    @property
    def has_bundled_tokenizer(self) -> bool:
        """Whether the tokenizer is the one of the bundled model."""
        return is_bundled_tokenizer(self.tokenizer.sha256)


def open_model(
    source: str | Path | Located | Weights, *, activations: str | None = None, threads: int | None = None
) -> OpenModel:
    """Open anything that runs, with its tokenizer; arguments and errors as `open_runner`."""
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads were asked for; give one or more")
    if isinstance(source, str | Path):
        source = locate(source)
    if not isinstance(source, Located):
        beside = source.origin.beside
        runner = get_target("torch").open(source, activations=activations, threads=threads)
        return OpenModel(runner, beside[0].parent if beside else None)
    runner = target_of(source).open(source, activations=activations, threads=threads)
    is_program = source.path.is_file()
    if is_program and activations not in (None, runner.info.activations):
        raise InputError(
            f"{source.given} has {runner.info.activations} activations built in; leave --activations out, "
            "or export it again with others"
        )
    return OpenModel(runner, source.path.parent if is_program else source.path)


def open_runner(path: str | Path | Weights, *, activations: str | None = None, threads: int | None = None) -> Runner:
    """Open anything that runs.

    Args:
        path: a checkpoint folder, a quantized checkpoint folder, a program (.onnx, .pte, .moss), an artifact folder, or
            `tiny`; or weights.
        activations: "fp32" (None), "planned", or an activation format, for quantized weights, which are run in
            PyTorch. Of anything else it can only confirm what is there.
        threads: CPU threads; None leaves it to the runtime.

    Raises:
        InputError: nothing that runs is there, or it cannot run with these activations.
    """
    return open_model(path, activations=activations, threads=threads).runner
