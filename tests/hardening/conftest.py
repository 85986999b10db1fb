# SPDX-License-Identifier: Apache-2.0
"""The good folders, made once for all tests of this folder."""

from pathlib import Path

import pytest
from hardening.samples import make_samples


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("samples")
    make_samples(folder)
    return folder
