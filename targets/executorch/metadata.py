# SPDX-License-Identifier: Apache-2.0
"""What a .pte of ours says about itself: JSON that its method `mossquant` returns, read here without running it."""

import json
from typing import Literal

from mossquant.config import MossNetConfig
from mossquant.targets.executorch.packages import EXECUTORCH
from mossquant.targets.executorch.program_file import CONSTANTS, WEIGHTS, ProgramFile
from mossquant.targets.metadata import Count, ProgramMetadata, parsed

__all__ = ["Metadata", "read_metadata", "weight_bytes"]


class Metadata(ProgramMetadata):
    """What the program is.

    Attributes:
        target: always "executorch".
        runtime_minimum: oldest ExecuTorch that it was run with.
        activations: format of the inputs of quantized linears: "fp32" where nothing is quantized, or "int8_row_asym".
        max_chunk: most tokens of one call of prefill or score.
    """

    target: Literal["executorch"] = "executorch"
    runtime_minimum: str = EXECUTORCH
    activations: Literal["fp32", "int8_row_asym"]
    max_chunk: Count


def read_metadata(file: ProgramFile) -> Metadata:
    """What a .pte says about itself. Raises `InputError`: not written by this project, or by another release."""
    return parsed(Metadata, json.dumps(file.metadata), file.path)


def weight_bytes(file: ProgramFile, config: MossNetConfig) -> int:
    """Bytes of codes, padding, scales and values in the program; a tied table, which is there twice, once."""
    sections = file.sections
    total = sections[WEIGHTS] + sections[CONSTANTS]
    tables = [one for one in file.methods["decode"].constants if one.ndim == 2 and one.shape[0] == config.vocab_size]
    return total - sum(table.nbytes for table in tables) if config.tie_word_embeddings else total
