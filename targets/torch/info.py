# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint, quantized or not, is. Nothing is run."""

from collections.abc import Iterable
from dataclasses import asdict, replace

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import Weights
from mossquant.formats.dtypes import dtype_name
from mossquant.formats.states import get_state_format
from mossquant.targets.info_report import InfoReport, WeightsRow, file_rows, text_facts
from mossquant.targets.target import active_share


def info(located: Located) -> InfoReport:
    """Say what a checkpoint is. Raises `InputError` where it is damaged."""
    if located.kind == "quantized checkpoint":
        return _of_quantized(located)
    weights = Checkpoint.open(located.path, path=located.given)
    rows = [
        WeightsRow(spec.role, dtype_name(stored.dtype), 1, spec.count, stored.nbytes)
        for name, spec in weights.specs.items()
        if (stored := weights.kept(name)) is not None
    ]
    text = weights.origin.training_text[:1]
    return _report(located, weights, rows, [("trained on text with SHA-256", digest) for digest in text], ())


def _of_quantized(located: Located) -> InfoReport:
    weights = QuantizedCheckpoint.open(located.path, path=located.given)
    entries, manifest = weights.plan.tensors, weights.manifest
    rows = []
    for entry in entries:
        error = entry.relative_error if entry.format is not None else None
        rows.append(WeightsRow(entry.role, entry.storage, 1, entry.count, entry.predicted_bytes, error, entry.reason))
    parent = manifest.parent
    facts = [
        ("recipe", weights.plan.recipe),
        ("targets", ", ".join(weights.plan.targets)),
        ("activations", ", ".join(sorted({site.format for site in weights.plan.activations}))),
        ("state", _state(weights)),
        ("made from", f"{parent.torch_dtype}, {parent.parameters} parameters, {parent.bytes} bytes"),
        ("written by", f"mossquant {manifest.release}"),
    ]
    return _report(located, weights, rows, facts, tuple(asdict(entry) for entry in entries))


def _state(weights: QuantizedCheckpoint) -> str:
    """State formats, and the bytes of what a stream carries before its first token."""
    states = weights.plan.state
    size = sum(get_state_format(state.format).bytes(state.shape) for state in states)
    return f"{', '.join(sorted({state.format for state in states}))}, {size:,} bytes a stream"


def _report(
    located: Located,
    weights: Weights,
    rows: Iterable[WeightsRow],
    facts: Iterable[tuple[str, str]],
    ledger: tuple[dict[str, object], ...],
) -> InfoReport:
    origin = weights.origin
    return InfoReport(
        path=located.given,
        kind=located.kind,
        weights=origin.name,
        config=weights.config,
        torch_dtype=origin.torch_dtype,
        parameters=origin.parameters,
        active_parameters=round(origin.parameters * active_share(weights.config)),
        weight_bytes=origin.payload_bytes,
        payload_bytes=origin.payload_bytes,
        rows=_merged(rows),
        files=file_rows(located.path, origin.files),
        sections={},
        facts=(*facts, *text_facts(origin.declared_text(weights.config.vocab_size))),
        ledger=ledger,
    )


def _merged(rows: Iterable[WeightsRow]) -> tuple[WeightsRow, ...]:
    """One row for each role and format, in the order in which they come."""
    merged: dict[tuple[str, str], WeightsRow] = {}
    for row in rows:
        before = merged.get((row.role, row.storage), replace(row, tensors=0, weights=0, bytes=0))
        errors = [error for error in (before.relative_error, row.relative_error) if error is not None]
        merged[row.role, row.storage] = replace(
            before,
            tensors=before.tensors + row.tensors,
            weights=before.weights + row.weights,
            bytes=before.bytes + row.bytes,
            relative_error=max(errors, default=None),
        )
    return tuple(merged.values())
