# SPDX-License-Identifier: Apache-2.0
"""Writes a quantized checkpoint (`mossquant.checkpoint.quantized`), tensor by tensor, in the plan's order.

What is written depends on the checkpoint, the recipe and the release alone: no clock, host, path or thread count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mossquant.checkpoint.packing import PackedTensor, quantization_config
from mossquant.checkpoint.tensorfiles import TensorWriter
from mossquant.checkpoint.weights import Weights
from mossquant.files.outputs import file_sha256, json_bytes, write_json
from mossquant.plan.entries import DecayError
from mossquant.plan.plan import Calibrated, Ledger, Plan
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
    """

    def __init__(self, folder: Path, weights: Weights, recipe: Recipe, plan: Plan) -> None:
        self._folder, self._weights, self._recipe, self._plan = folder, weights, recipe, plan
        quantized = sum(entry.format is not None for entry in plan.tensors)
        self._tensors = TensorWriter(folder, total_bytes=plan.predicted_bytes + quantized * _SHAPE_BYTES)
        self._results: dict[str, tuple[int, float]] = {}
        self._notes: dict[str, str] = {}

    def add(self, name: str, piece: PackedTensor | Tensor, relative_error: float, note: str | None = None) -> None:
        """Store a tensor, quantized or kept, with the error that it has; the note goes into the ledger."""
        stored = {name: piece} if isinstance(piece, Tensor) else piece.tensors
        for own, tensor in stored.items():
            self._tensors.add(own, tensor)
        self._record(name, piece.nbytes if isinstance(piece, Tensor) else piece.payload_bytes, relative_error)
        if note is not None:
            self._notes[name] = note

    def _record(self, name: str, written: int, relative_error: float) -> None:
        predicted = self._plan.by_name[name].predicted_bytes
        assert written == predicted, f"{name}: {written} bytes written, {predicted} predicted"
        self._results[name] = (written, relative_error)

    def finish(
        self,
        calibrated: Calibrated | None = None,
        *,
        calibration_text: Sequence[str] = (),
        decays: Mapping[str, DecayError] | None = None,
    ) -> Ledger:
        """Write what is left of the tensors, config, recipe, ledger and manifest.

        Args:
            calibrated: how text entered.
            calibration_text: SHA-256 of the texts that did.
            decays: name of each tensor of decays → what became of them on that text.
        """
        self._tensors.close()
        folder, weights, recipe = self._folder, self._weights, self._recipe
        origin = weights.origin
        ledger = replace(self._plan.with_results(self._results, self._notes, decays), calibrated=calibrated)
        seen = dict.fromkeys((*origin.calibration_text, *calibration_text))
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
                "text": {"training": list(origin.training_text), "calibration": list(seen)},
            },
        )
        return ledger
