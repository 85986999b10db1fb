# SPDX-License-Identifier: Apache-2.0
"""What a .pte of ours says about itself: JSON that its method `mossquant` returns."""

from typing import Literal

from pydantic import Field

from mossquant.targets.executorch.packages import EXECUTORCH
from mossquant.targets.metadata import Count, ProgramMetadata
from mossquant.targets.native.metadata import Layout


class Metadata(ProgramMetadata):
    """What the program is.

    Attributes:
        max_chunk: most tokens of one call of prefill or score.
        layout: what matrices are packed for, where the kernels are ours; None, and then not written: they are
            ExecuTorch's.
    """

    target: Literal["executorch"] = "executorch"
    runtime_minimum: str = EXECUTORCH
    state_format: Literal["fp32"] = "fp32"
    activations: Literal["fp32", "int8_row_asym", "int8_block"]
    max_chunk: Count
    layout: Layout | None = Field(default=None, exclude_if=lambda layout: layout is None)
