# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch as a target: a .pte with its linears delegated to XNNPACK."""

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.model.config import MossNetConfig
from mossquant.plan.capabilities import Activations
from mossquant.progress import Progress
from mossquant.runner import Runner
from mossquant.targets.executorch.metadata import open_to_run
from mossquant.targets.executorch.packages import check_packages
from mossquant.targets.executorch.runner import ExecutorchRunner
from mossquant.targets.info_report import InfoReport
from mossquant.targets.target import Prepared, active_share
from mossquant.targets.weights_report import WeightsReport

__all__ = ["TARGET"]


class _Executorch:
    """See `mossquant.targets.target.Target`."""

    name, runtime = "executorch", "executorch"

    def prepare(self, weights: Weights, *, activations: Activations | None, progress: Progress | None) -> Prepared:
        check_packages()
        from mossquant.targets.executorch.export import prepare

        return prepare(weights, activations=activations, progress=progress)

    def open(self, source: Located | Weights, *, activations: str | None, threads: int | None) -> Runner:
        assert isinstance(source, Located), "weights are run by PyTorch"
        return ExecutorchRunner(source.path, given=source.given, threads=threads)

    def warm(self, located: Located) -> None:
        open_to_run(located.path)

    def info(self, located: Located) -> InfoReport:
        from mossquant.targets.executorch.info import info

        return info(located)

    def read_back(self, weights: Weights, located: Located) -> WeightsReport:
        from mossquant.targets.executorch.read_back import read_back

        return read_back(weights, located)

    def active_share(self, config: MossNetConfig) -> float:
        """All experts of both kinds are computed."""
        return active_share(config, computes_all={"ssm": True, "mlp": True})


TARGET = _Executorch()
