# SPDX-License-Identifier: Apache-2.0
"""What only the native Runner has: a library whose memory it owns, and threads. The rest is in `test_promises.py`."""

import gc
from pathlib import Path
from weakref import finalize

import numpy as np
import pytest
from lowered import Lowered, Workshop

from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.kernels import _native
from mossquant.model.mossnet import state_specs
from mossquant.targets.native import library
from mossquant.targets.native.export import host_layout
from mossquant.targets.native.library import Model, ModelState, MossError, load_library
from mossquant.targets.native.runner import NativeRunner

HEADER = Path(library.__file__).parent / "include" / "moss.h"


@pytest.fixture(scope="module")
def lowered(workshop: Workshop) -> Lowered:
    return workshop("wide", "int4", target="native")


def test_info(lowered: Lowered) -> None:
    info = lowered.runner.info
    assert (info.path, info.kind, info.weights) == (str(lowered.artifact), "native", "int4-uniform")
    assert (info.activations, info.state_format, info.vocab_size) == ("int8_block", "fp32", lowered.config.vocab_size)
    assert (info.max_batch, info.max_chunk) == (None, None)
    assert info.file_bytes == lowered.program.stat().st_size
    assert info.files == {"model.moss": file_sha256(lowered.program)}
    assert 4.5 < info.bits_per_weight < 9


def test_what_the_library_says(lowered: Lowered) -> None:
    model = NativeRunner(lowered.artifact, threads=1).model
    best = _native.selected("linear", "f32_int8_block_int4_g32", _native.cpu_flags())
    assert (model.layout, model.linear_kernel) == (host_layout(), best)
    sizes = [int(np.prod(spec.shape)) for spec in state_specs(lowered.config)]
    assert model.state_sizes == sizes
    assert 0 < model.private_bytes < 1 << 22
    plain = NativeRunner(lowered.artifact, threads=1, isa="baseline").model
    assert plain.linear_kernel.endswith("_scalar")


def test_every_function_of_the_header_is_declared() -> None:
    """Each that is called has the name that a header gives it; the version is the header's."""
    text = "".join(header.read_text("utf-8") for header in (HEADER, HEADER.with_name("moss_blocks.h")))
    for name in library._FUNCTIONS:
        assert f"{name}(" in text
    assert f"#define MOSS_ABI_VERSION {library.ABI_VERSION}\n" in text


@pytest.mark.parametrize("threads", [-1, 1 << 20])
def test_threads_that_cannot_be(lowered: Lowered, threads: int) -> None:
    with pytest.raises(InputError, match=r"threads must be 0 \.\. 1024"):
        NativeRunner(lowered.artifact, threads=threads)


def test_kernels_that_are_not_known(lowered: Lowered) -> None:
    with pytest.raises(InputError, match="isa 'sse' is not one of baseline, avx2"):
        NativeRunner(lowered.artifact, isa="sse")


def test_more_streams_than_there_may_be(lowered: Lowered) -> None:
    with pytest.raises(InputError, match=r"has no state of 65537 streams: batch must be"):
        lowered.runner.initial_state(65537)


def test_a_state_outlives_its_runner(lowered: Lowered) -> None:
    """The model is closed after the last state of it is gone, whichever is let go first."""
    freed: list[str] = []
    runner = NativeRunner(lowered.artifact, threads=1)
    model, state = runner.model, runner.initial_state(2)
    carried: ModelState = state.peek()
    finalize(model, freed.append, "model")
    finalize(carried, freed.append, "state")
    del runner, model
    gc.collect()
    assert freed == []
    values = np.empty((2, *state_specs(lowered.config)[0].shape), np.float32)
    carried.read(0, values)
    assert not values.any()
    del carried, state
    gc.collect()
    assert freed == ["state", "model"]


def test_errors_of_the_library_have_a_line(lowered: Lowered) -> None:
    model = Model(lowered.program, threads=1)
    state = model.state(1)
    logits = np.empty((1, 1, lowered.config.vocab_size), np.float32)
    with pytest.raises(MossError, match="token 80 is outside the vocabulary of 80"):
        state.forward(np.array([[80]]), library.LAST, logits)
    with pytest.raises(MossError, match="which must be"):
        state.forward(np.array([[1]]), 7, logits)
    state.forward(np.array([[79]]), library.LAST, logits)
    assert np.isfinite(logits).all()


def test_a_library_that_is_not_there(lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "libmoss.so")
    load_library.cache_clear()
    try:
        with pytest.raises(InputError, match=r"libmoss\.so cannot be loaded .*; install mossquant again"):
            NativeRunner(lowered.artifact)
    finally:
        load_library.cache_clear()


def test_a_library_of_another_release(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", 7)
    load_library.cache_clear()
    try:
        with pytest.raises(InputError, match=r"has interface 1, and this release needs 7; install mossquant again"):
            NativeRunner(lowered.artifact)
    finally:
        load_library.cache_clear()
