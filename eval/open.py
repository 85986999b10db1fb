# SPDX-License-Identifier: Apache-2.0
"""Any PATH argument as something that runs, with the tokenizer that belongs to it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mossquant.checkpoint.locate import BUNDLED, Located, asset_folder, locate
from mossquant.errors import InputError
from mossquant.files.inputs import is_there
from mossquant.files.outputs import file_sha256
from mossquant.runner import Runner
from mossquant.text.text import Tokenizer

__all__ = ["OpenModel", "open_model", "open_runner"]


@dataclass(frozen=True)
class OpenModel:
    """A Runner, what it was opened from, and its tokenizer.

    Attributes:
        located: the PATH argument, understood.
        runner: what runs.
    """

    located: Located
    runner: Runner

    @property
    def folder(self) -> Path:
        """The folder where `tokenizer.json` lies, if there is one."""
        return self.located.path.parent if self.located.path.is_file() else self.located.path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `InputError` where it takes token ids only, or its tokenizer is not there."""
        if self.runner.info.tokenizer_sha256 is not None and not is_there(self.folder / "tokenizer.json"):
            name = self.located.path.name
            raise InputError(f"{self.folder} has no tokenizer.json, and {name} was exported with one: copy it there")
        return Tokenizer.for_folder(self.folder, self.runner.info.vocab_size)

    @property
    def has_bundled_tokenizer(self) -> bool:
        """Whether the tokenizer is the one of the bundled model."""
        return self.tokenizer.sha256 == file_sha256(asset_folder(BUNDLED) / "tokenizer.json")


def open_model(path: str | Path | Located, *, activations: str | None = None, threads: int | None = None) -> OpenModel:
    """Open anything that runs, by a PATH argument: see `open_runner`."""
    located = path if isinstance(path, Located) else locate(path)
    return OpenModel(located, _runner(located, activations, threads))


def open_runner(path: str | Path, *, activations: str | None = None, threads: int | None = None) -> Runner:
    """Open anything that runs.

    Args:
        path: a checkpoint folder, a quantized checkpoint folder, an .onnx or .pte file, an artifact folder, or
            `tiny`.
        activations: "fp32" (None), "planned", or an activation format, for a quantized checkpoint, which is run in
            PyTorch. Of anything else it can only confirm what is there.
        threads: CPU threads; None leaves it to the runtime.

    Raises:
        InputError: nothing that runs is there, or it cannot run with these activations.
    """
    return _runner(locate(path), activations, threads)


def _runner(located: Located, activations: str | None, threads: int | None) -> Runner:
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads were asked for; give one or more")
    # A runtime is imported only where it is used: a torch checkpoint needs no onnxruntime.
    if located.kind in ("onnx", "executorch"):
        artifact = _artifact_runner(located, threads)
        if activations not in (None, artifact.info.activations):
            raise InputError(
                f"{located.given} was exported with {artifact.info.activations} activations, not {activations}; "
                "export it again, or run it as it is"
            )
        return artifact
    from mossquant.targets.torch.runner import TorchRunner

    return TorchRunner.open(located, activations=activations or "fp32", threads=threads)


def _artifact_runner(located: Located, threads: int | None) -> Runner:
    if located.kind == "onnx":
        from mossquant.targets.onnx import OnnxRunner

        return OnnxRunner(located.given, threads=threads)
    from mossquant.targets.executorch import ExecutorchRunner

    return ExecutorchRunner(located.given, threads=threads)
