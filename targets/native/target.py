# SPDX-License-Identifier: Apache-2.0
"""Our own runtime as a target: a .moss for libmoss, which reads the chosen experts and no other."""

from collections.abc import Callable
from pathlib import Path

from mossquant.release import release
from mossquant.runner import Runner
from mossquant.targets.target import Target


class _Native(Target):
    @property
    def runtime_version(self) -> str:
        """libmoss is a part of this package."""
        return release()

    def mapped(self, runner: Runner) -> Path | None:
        """The .moss, unless its matrices were packed anew, or made fp32, when it was opened."""
        from mossquant.targets.native.runner import NativeRunner

        assert isinstance(runner, NativeRunner)
        return runner.path if runner.model.linear_kernel and not runner.model.repacked else None

    def profiled(self, runner: Runner, work: Callable[[], None]) -> dict[str, float]:
        """libmoss times its own parts."""
        from mossquant.targets.native.runner import NativeRunner

        assert isinstance(runner, NativeRunner)
        return runner.model.profiled(work)


TARGET = _Native("native", runtime="libmoss", options={"isa": ("host", "x86", "arm", "rows")})
