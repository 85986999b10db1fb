# SPDX-License-Identifier: Apache-2.0
"""Targets by name."""

import pytest

from mossquant.errors import InputError
from mossquant.plan.capabilities import CAPABILITIES
from mossquant.targets.registry import exporters, get_exporters


def test_every_target_is_one_that_plans_are_checked_against() -> None:
    assert set(exporters()) <= set(CAPABILITIES)
    assert {"onnx", "executorch"} == set(exporters())


def test_an_unknown_target() -> None:
    with pytest.raises(InputError, match="unknown target 'tflite'; known targets: onnx, executorch"):
        get_exporters(["onnx", "tflite"])
    with pytest.raises(InputError, match="target 'onnx' is named twice"):
        get_exporters(["onnx", "executorch", "onnx"])
    with pytest.raises(InputError, match="no target was given"):
        get_exporters([])
