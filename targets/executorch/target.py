# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch as a target: a .pte with its linears delegated to XNNPACK, which computes all experts of both kinds; or
with blocks that are operators of ours and compute the chosen ones.
"""

from collections.abc import Mapping, Sequence

from mossquant.plan.capabilities import OWN_KERNELS, Capabilities
from mossquant.runner import Runner
from mossquant.targets.target import Target, active_share


class _Executorch(Target):
    def choices(self, option: str, given: Mapping[str, str]) -> Sequence[str]:
        """Only our own kernels want matrices packed for a family of processors."""
        return () if option == "isa" and given.get("kernels") != "mossquant" else super().choices(option, given)

    def capabilities(self, given: Mapping[str, str]) -> Capabilities:
        """Our own kernels hold what libmoss does."""
        return OWN_KERNELS[self.name] if given.get("kernels") == "mossquant" else super().capabilities(given)

    def active_share_of(self, runner: Runner) -> float:
        """Our own kernels compute the chosen experts."""
        from mossquant.targets.executorch.runner import ExecutorchRunner

        assert isinstance(runner, ExecutorchRunner)
        return active_share(runner.config) if runner.own_kernels else super().active_share_of(runner)


TARGET = _Executorch(
    "executorch",
    runtime="executorch",
    computes_all=("ssm", "mlp"),
    options={"kernels": ("stock", "mossquant"), "isa": ("host", "x86", "arm", "rows")},
)
