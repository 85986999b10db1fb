# SPDX-License-Identifier: Apache-2.0
"""What a .pte of ours says about itself: JSON that its method `mossquant` returns."""

from typing import Literal

from mossquant.targets.executorch.packages import EXECUTORCH
from mossquant.targets.metadata import Count, ProgramMetadata


class Metadata(ProgramMetadata):
    """What the program is.

    Attributes:
        max_chunk: most tokens of one call of prefill or score.
    """

    target: Literal["executorch"] = "executorch"
    runtime_minimum: str = EXECUTORCH
    activations: Literal["fp32", "int8_row_asym"]
    max_chunk: Count
