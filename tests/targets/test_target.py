# SPDX-License-Identifier: Apache-2.0
"""Targets by name, and what each says of itself."""

from dataclasses import replace
from pathlib import Path

import pytest
from small import SMALL

from mossquant.errors import InputError
from mossquant.model.mossnet import parameter_count, tensor_specs
from mossquant.plan.capabilities import CAPABILITIES
from mossquant.release import release
from mossquant.targets.export import export_needs
from mossquant.targets.target import active_share, get_target, program_targets, runtimes


def test_every_target_in_the_list_is_an_object() -> None:
    assert [get_target(name).name for name in CAPABILITIES] == list(CAPABILITIES)
    assert program_targets() == ("onnx", "executorch", "native")
    assert list(runtimes()) == ["torch", "onnxruntime", "executorch", "libmoss"]
    assert all(runtimes().values())
    assert runtimes()["libmoss"] == release()


def test_targets_that_cannot_be_lowered_to(checkpoint_folder: Path) -> None:
    for names, message in (
        (["onnx", "tflite"], "unknown target 'tflite'; known targets: onnx, executorch, native"),
        (["torch"], "unknown target 'torch'; known targets: onnx, executorch, native"),
        (["onnx", "executorch", "onnx"], "target 'onnx' is named twice"),
        ([], "no target was given"),
        (["onnx", ""], "unknown target ''; known targets: onnx, executorch, native"),
    ):
        with pytest.raises(InputError, match=message):
            export_needs(checkpoint_folder, target=names)


def test_an_option_is_for_the_targets_that_have_it(checkpoint_folder: Path) -> None:
    with pytest.raises(InputError, match="--scales is for onnx and not for executorch; leave it out"):
        export_needs(checkpoint_folder, target="executorch", scales="folded")
    with pytest.raises(InputError, match="unknown --scales value 'none'; known values: folded, initializers"):
        export_needs(checkpoint_folder, scales="none")
    with pytest.raises(InputError, match="--isa is for native and not for onnx, executorch; leave it out"):
        export_needs(checkpoint_folder, target=["onnx", "executorch"], isa="x86")
    assert get_target("onnx").options == {"scales": ("folded", "initializers")}
    with pytest.raises(InputError, match="--isa is for native and not for executorch; leave it out"):
        export_needs(checkpoint_folder, target="executorch", kernels="stock", isa="x86")
    assert get_target("native").options == {"isa": ("host", "x86", "arm", "rows")}
    assert get_target("executorch").options["kernels"] == ("stock", "mossquant")


def test_active_share_counts_the_chosen_experts() -> None:
    active = sum(
        spec.count * (0.5 if spec.expert is not None else 1.0)
        for spec in tensor_specs(SMALL)  # two of four
    )
    assert active_share(SMALL) == pytest.approx(active / parameter_count(SMALL))
    untied = replace(SMALL, tie_word_embeddings=False)
    more = untied.hidden_size * (untied.vocab_size + 1 - untied.vocab_size)
    assert active_share(untied) == pytest.approx((active + more) / parameter_count(untied))
    assert active_share(SMALL, computes_all=("ssm", "mlp")) == 1
    assert (
        active_share(SMALL)
        == get_target("native").active_share(SMALL)
        < get_target("onnx").active_share(SMALL)
        < get_target("executorch").active_share(SMALL)
    )
