# SPDX-License-Identifier: Apache-2.0
"""PyTorch as a target, the reference: it runs weights as they are, and lowers nothing."""

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.runner import Runner
from mossquant.targets.target import Prepared, Target
from mossquant.targets.torch.runner import TorchRunner
from mossquant.targets.weights_report import WeightsReport


class _Torch(Target):
    def prepare(self, weights: Weights, **_: object) -> Prepared:
        raise InputError(f"{weights.origin.path} runs in PyTorch as it is; export it to another target")

    def open(self, source: Located | Weights, *, activations: str | None, threads: int | None) -> Runner:
        return TorchRunner.open(source, activations=activations or "fp32", threads=threads)

    def warm(self, located: Located) -> None:
        """PyTorch is imported with this module."""

    def read_back(self, weights: Weights, located: Located) -> WeightsReport:
        raise InputError(f"{located.given} is no program; give one that was lowered from a checkpoint")


TARGET = _Torch("torch", runtime="torch")
