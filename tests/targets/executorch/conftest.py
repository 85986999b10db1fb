# SPDX-License-Identifier: Apache-2.0
"""The programs of the tests of this target: lowering takes long, so there are few."""

from pathlib import Path

import pytest
from lowered import Lowered

from mossquant.model.config import MossNetConfig


@pytest.fixture(scope="session")
def int4(tiny_config: MossNetConfig, quantized_folder: Path, pte_folder: Path) -> Lowered:
    """The small model of the whole line at int4; a dt_rank of 12 in groups of 32."""
    return Lowered(tiny_config, quantized_folder, pte_folder, "executorch")
