# SPDX-License-Identifier: Apache-2.0
"""Our own runtime as a target: a .moss for libmoss, which reads the chosen experts and no other."""

from mossquant.release import release
from mossquant.targets.target import Target


class _Native(Target):
    @property
    def runtime_version(self) -> str:
        """libmoss is a part of this package."""
        return release()


TARGET = _Native("native", runtime="libmoss", options={"isa": ("host", "x86", "arm", "rows")})
