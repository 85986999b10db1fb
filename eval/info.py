# SPDX-License-Identifier: Apache-2.0
"""`info`: what a file or folder is. Its target says it; nothing is run."""

from pathlib import Path

from mossquant.checkpoint.locate import locate
from mossquant.targets.info_report import InfoReport
from mossquant.targets.target import target_of


def info(path: str | Path) -> InfoReport:
    """Say what is at a PATH argument.

    Raises:
        InputError: nothing that mossquant knows is there, or it is damaged.
    """
    located = locate(path)
    return target_of(located).info(located)
