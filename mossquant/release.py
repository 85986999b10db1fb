# SPDX-License-Identifier: Apache-2.0
"""Which release of this package is running: stored files say it, and `mossquant --version`."""

from importlib.metadata import version


def release() -> str:
    """The installed release, e.g. "0.1.0"."""
    return version("mossquant")
