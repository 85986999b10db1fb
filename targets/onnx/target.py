# SPDX-License-Identifier: Apache-2.0
"""ONNX as a target: one graph for stock onnxruntime."""

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.model.config import MossNetConfig
from mossquant.plan.capabilities import Activations
from mossquant.progress import Progress
from mossquant.runner import Runner
from mossquant.targets.info_report import InfoReport
from mossquant.targets.onnx.open import open_to_run
from mossquant.targets.onnx.runner import OnnxRunner
from mossquant.targets.target import Prepared, active_share
from mossquant.targets.weights_report import WeightsReport

__all__ = ["TARGET"]


class _Onnx:
    """See `mossquant.targets.target.Target`."""

    name, runtime = "onnx", "onnxruntime"

    def prepare(self, weights: Weights, *, activations: Activations | None, progress: Progress | None) -> Prepared:
        from mossquant.targets.onnx.export import prepare

        return prepare(weights, activations=activations, progress=progress)

    def open(self, source: Located | Weights, *, activations: str | None, threads: int | None) -> Runner:
        assert isinstance(source, Located), "weights are run by PyTorch"
        return OnnxRunner(source.path, given=source.given, threads=threads)

    def warm(self, located: Located) -> None:
        open_to_run(located.path)

    def info(self, located: Located) -> InfoReport:
        from mossquant.targets.onnx.info import info

        return info(located)

    def read_back(self, weights: Weights, located: Located) -> WeightsReport:
        from mossquant.targets.onnx.read_back import read_back

        return read_back(weights, located)

    def active_share(self, config: MossNetConfig) -> float:
        """All SSM experts lie in one matmul, so that every one of them is read."""
        return active_share(config, computes_all={"ssm": True})


TARGET = _Onnx()
