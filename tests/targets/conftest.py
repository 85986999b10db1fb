# SPDX-License-Identifier: Apache-2.0
"""One workshop for the tests of all targets."""

import pytest
from lowered import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("lowered"))
