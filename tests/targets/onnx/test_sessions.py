# SPDX-License-Identifier: Apache-2.0
"""An .onnx computes what it should in any session: all optimization levels, no constant folding, no prepacking."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from bounds import ONNX_FP32, ONNX_INT8_MEDIAN
from kept import KEPT_ONNX
from lowered import Lowered, Workshop, read_back, relative
from numpy.typing import NDArray

from mossquant.checkpoint.locate import locate
from mossquant.targets.artifact import Artifact
from mossquant.targets.export import export
from mossquant.targets.target import get_target

BATCH, TIME = 3, 3
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
SESSIONS = [*((level, level != LEVELS[0]) for level in LEVELS), (LEVELS[-1], False)]
"""Level, and whether constants are folded."""
FORMS = ("folded", "initializers")


def _session(lowered: Lowered, level: str, *, folding: bool, prepacking: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepacking)))
    off = [] if folding else ["ConstantFolding"]
    return ort.InferenceSession(lowered.program, options, disabled_optimizers=off)


@pytest.mark.parametrize("recipe", ["int4", "int8"])
@pytest.mark.parametrize("scales", FORMS)
def test_any_session_computes_the_checkpoint(workshop: Workshop, scales: str, recipe: str) -> None:
    """With the activations of the plan where codes are packed, else with fp32 ones."""
    lowered = workshop("wide", recipe, scales=scales)
    assert read_back(lowered.checkpoint, lowered.artifact).differences == ()
    tokens = lowered.tokens(BATCH, TIME)
    exact = lowered.reference(activations="fp32")
    references = {False: exact, True: lowered.reference()}
    sessions = {
        (level, folding, prepacking): _session(lowered, level, folding=folding, prepacking=prepacking)
        for level, folding in SESSIONS
        for prepacking in (True, False)
    }
    found: dict[tuple[str, bool, bool], list[NDArray[np.float64]]] = {key: [] for key in sessions}
    state = exact.initial_state(BATCH)
    for time in range(TIME):
        now, arrays = tokens[:, time : time + 1], exact.read(state)
        expected = {packed: runner(now, runner.write(arrays))[0] for packed, runner in references.items()}
        for key, session in sessions.items():
            _, folding, prepacking = key
            packed = prepacking and (folding or scales == "initializers")
            logits = session.run(["logits"], {"tokens": now, "first_logit": np.array([0]), **arrays})[0]
            found[key].append(relative(logits, expected[packed]))
        _, state = exact(now, state)
    worst = {key: max(map(np.max, values)) for key, values in found.items()}
    median = {key: float(np.median(values)) for key, values in found.items()}
    assert max(median.values()) <= ONNX_INT8_MEDIAN, median
    fp32 = [key for key in worst if not (key[2] and (key[1] or scales == "initializers"))]
    assert max(worst[key] for key in fp32) <= ONNX_FP32, worst


@pytest.mark.parametrize("scales", FORMS)
def test_manifest_and_info_say_what_a_session_needs(workshop: Workshop, scales: str) -> None:
    lowered = workshop("wide", "int4", scales=scales)
    needs = ["constant folding", "prepacking"] if scales == "folded" else ["prepacking"]
    assert Artifact.open(lowered.artifact).manifest.programs["onnx"].runtime.session == needs
    said = dict(get_target("onnx").info(locate(lowered.artifact)).facts)["session"]
    assert said == f"{' and '.join(needs)} on, else right but slow"


def test_scales_of_a_model_that_is_not_quantized_are_none(workshop: Workshop, tmp_path: Path) -> None:
    made = export(workshop.checkpoint("wide"), tmp_path / "out", scales="initializers")
    assert made.notes == ("model.onnx: nothing is quantized, so that --scales changes nothing",)
    assert made.program("onnx").read_bytes() == workshop("wide").program.read_bytes()


def test_info_says_that_an_older_program_gives_zeros_without_folding() -> None:
    assert "zero" in dict(get_target("onnx").info(locate(KEPT_ONNX)).facts)["session"]


def test_the_forms_hold_the_same_codes_and_scales(workshop: Workshop) -> None:
    """Bit for bit where both fold and pack; fp32 scales are larger."""
    forms = [workshop("wide", "int8", scales=scales) for scales in FORMS]
    folded, larger = (form.runner(form.tokens(1, 5), form.runner.initial_state(1))[0] for form in forms)
    np.testing.assert_array_equal(folded, larger)
    sizes = [form.runner.info.weight_bytes for form in forms]
    assert sizes[0] < sizes[1]
