# SPDX-License-Identifier: Apache-2.0
"""Writes a quantized checkpoint (`mossquant.checkpoint.quantized`), tensor by tensor, in the plan's order.

What is written depends on the checkpoint, the recipe and the release alone: no clock, host, path or thread count.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mossquant.checkpoint.packing import PackedTensor, quantization_config
from mossquant.checkpoint.tensorfiles import TensorWriter
from mossquant.checkpoint.weights import Weights
from mossquant.files.outputs import file_sha256, json_bytes, write_json
from mossquant.plan.plan import Ledger, Plan
from mossquant.plan.recipe import Recipe
from mossquant.release import release

_SHAPE_BYTES = 16
_HEADER_BYTES = 200
_RESULT_BYTES = 40
_NOTE_BYTES = 200
_REST_BYTES = 1 << 16


def container_bytes(plan: Plan) -> int:
    """What comes on top of the payload, at most: padded shapes and tensor headers, ledger, config, recipe, manifest.

    What is copied along (a tokenizer) is not counted.
    """
    ledger = len(json_bytes(plan.to_json())) + len(plan.tensors) * (_RESULT_BYTES + _NOTE_BYTES)
    return ledger + len(plan.tensors) * (3 * _HEADER_BYTES + _SHAPE_BYTES) + _REST_BYTES


class QuantizedWriter:
    """Takes every tensor of the plan; `finish` writes the rest and gives the ledger.

    Args:
        folder: an existing, empty folder (itself written aside).
        weights: what is quantized.
        recipe: what was asked.
        plan: what was planned.
        calibration_text: SHA-256 of the texts that it is calibrated on.
    """

    def __init__(
        self, folder: Path, weights: Weights, recipe: Recipe, plan: Plan, *, calibration_text: Sequence[str] = ()
    ) -> None:
        self._folder, self._weights, self._recipe, self._plan = folder, weights, recipe, plan
        self._calibration_text = calibration_text
        quantized = sum(entry.format is not None for entry in plan.tensors)
        self._tensors = TensorWriter(folder, total_bytes=plan.predicted_bytes + quantized * _SHAPE_BYTES)
        self._results: dict[str, tuple[int, float]] = {}
        self._notes: dict[str, str] = {}

    def add_quantized(self, name: str, packed: PackedTensor, relative_error: float, note: str | None = None) -> None:
        """Store a quantized tensor; the note goes into the ledger."""
        for stored, tensor in packed.tensors.items():
            self._tensors.add(stored, tensor)
        self._record(name, packed.payload_bytes, relative_error)
        if note is not None:
            self._notes[name] = note

    def add_kept(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is kept."""
        self._tensors.add(name, tensor)
        self._record(name, tensor.nbytes, 0.0)

    def _record(self, name: str, written: int, relative_error: float) -> None:
        predicted = self._plan.by_name[name].predicted_bytes
        assert written == predicted, f"{name}: {written} bytes written, {predicted} predicted"
        self._results[name] = (written, relative_error)

    def finish(self) -> Ledger:
        """Write what is left of the tensors, config, recipe, ledger and manifest."""
        self._tensors.close()
        folder, weights, recipe = self._folder, self._weights, self._recipe
        origin, ledger = weights.origin, self._plan.with_results(self._results, self._notes)
        config = weights.config.to_json(torch_dtype=origin.torch_dtype)
        config["quantization_config"] = quantization_config(weights.specs, ledger)
        write_json(folder / "config.json", config)
        (folder / "recipe.yaml").write_text(recipe.text, encoding="utf-8", newline="")
        write_json(folder / "ledger.json", ledger.to_json())
        for path in origin.beside:
            (folder / path.name).write_bytes(path.read_bytes())
        files = {
            path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())
        }
        write_json(
            folder / "manifest.json",
            {
                "version": 1,
                "kind": "quantized checkpoint",
                "release": release(),
                "recipe": recipe.name,
                "payload_bytes": ledger.predicted_bytes,
                "files": files,
                "parent": {
                    "torch_dtype": origin.torch_dtype,
                    "parameters": origin.parameters,
                    "bytes": origin.payload_bytes,
                    "files": dict(origin.files),
                },
                "text": {
                    "training": list(origin.training_text),
                    "calibration": [*origin.calibration_text, *self._calibration_text],
                },
            },
        )
        return ledger
