# SPDX-License-Identifier: Apache-2.0
"""The good folders, made once for all tests of this folder."""

from pathlib import Path

import pytest
from hardening.samples import make_samples
from shared import once


@pytest.fixture(scope="session")
def samples(shared: Path) -> Path:
    """Not to be changed."""

    def make(folder: Path) -> None:
        folder.mkdir()
        make_samples(folder)

    return once(shared / "samples", make)
