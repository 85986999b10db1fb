# SPDX-License-Identifier: Apache-2.0
"""One workshop for the tests of all targets."""

from pathlib import Path

import pytest
from lowered import Workshop


@pytest.fixture(scope="session")
def workshop(shared: Path) -> Workshop:
    folder = shared / "lowered"
    folder.mkdir(exist_ok=True)
    return Workshop(folder)
