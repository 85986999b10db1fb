# SPDX-License-Identifier: Apache-2.0
"""What can be wrong in a quantized checkpoint: ledger against config, tensor files against ledger, scales, codes."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from mossquant.checkpoint.packing import stored_names, unpack
from mossquant.checkpoint.tensorfiles import TensorFiles, all_finite
from mossquant.files.space import row_blocks
from mossquant.formats import FORMATS, get_format
from mossquant.formats.activations import ACTIVATION_FORMATS, STATE_FORMATS
from mossquant.formats.dtypes import FLOAT_DTYPES, dtype_name
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import activation_sites, parameter_count, state_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.plan import Plan, SiteEntry, TensorEntry

__all__ = ["code_offenders", "plan_offenders", "structure_offenders", "value_offenders"]


def plan_offenders(config: MossNetConfig, specs: Mapping[str, TensorSpec], plan: Plan) -> list[str]:
    """What a ledger says that cannot be true of a model of this config."""
    if [entry.name for entry in plan.tensors] != list(specs):
        return ["ledger.json lists other tensors than config.json asks for"]
    offenders = []
    for entry in plan.tensors:
        said = asdict(entry)
        if said | _expected(specs[entry.name], entry) != said or not _came_from_a_checkpoint(entry):
            offenders.append(f"ledger.json: {entry.name} has a role, shape, format or size that it cannot have")
    sites = [(spec.name, spec.role, spec.width, spec.tensors) for spec in activation_sites(config)]
    if [(site.name, site.role, site.width, site.tensors) for site in plan.activations] != sites:
        return [*offenders, "ledger.json lists other activation sites than config.json asks for"]
    wrong = [site for site in plan.activations if not _site_fits(site, plan)]
    offenders += [f"ledger.json: {site.name} cannot have format {site.format[:40]!r}" for site in wrong]
    states = [(spec.name, spec.role, spec.shape) for spec in state_specs(config)]
    if [(state.name, state.role, state.shape) for state in plan.state] != states:
        offenders.append("ledger.json lists other state arrays than config.json asks for")
    if not parameter_count(config) <= plan.parameters < 1 << 63:
        offenders.append(f"ledger.json says {plan.parameters} parameters, the model has {parameter_count(config)}")
    if any(state.format not in STATE_FORMATS for state in plan.state):
        offenders.append("ledger.json has unknown state formats")
    return offenders


def _expected(spec: TensorSpec, entry: TensorEntry) -> dict[str, Any]:
    """What an entry must say, given its format."""
    rows, columns = spec.matrix_shape
    out: dict[str, Any] = {"role": spec.role, "shape": spec.shape, "rows": rows, "columns": columns}
    if entry.format in FORMATS and entry.kept is None:
        found = FORMATS[entry.format]
        out |= {"padded_columns": found.padded_columns(columns), "predicted_bytes": found.payload_bytes(rows, columns)}
    elif entry.kept in FLOAT_DTYPES and entry.format is None:
        out |= {"padded_columns": columns, "predicted_bytes": spec.count * FLOAT_DTYPES[entry.kept].itemsize}
    else:
        out["format"] = "one of them"
    return out | {"written_bytes": out.get("predicted_bytes")}


def _came_from_a_checkpoint(entry: TensorEntry) -> bool:
    """What only the run could know, as far as it can be told: bytes that were there, the solver, the error."""
    sizes = {entry.count * dtype.itemsize for dtype in FLOAT_DTYPES.values()}
    solver = (entry.solver is None) == (entry.format is None)
    return entry.stored_bytes in sizes and solver and entry.relative_error is not None and entry.relative_error >= 0


def _site_fits(site: SiteEntry, plan: Plan) -> bool:
    if site.format not in ACTIVATION_FORMATS:
        return False
    formats = {plan.by_name[name].format for name in site.tensors if name in plan.by_name} - {None}
    blocks = {FORMATS[name].activation_block for name in formats if name in FORMATS}
    return site.block is None if not ACTIVATION_FORMATS[site.format].blocked else blocks == {site.block}


def structure_offenders(plan: Plan, files: TensorFiles) -> list[str]:
    """What tensor files hold that the ledger does not say: names, shapes, types."""
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for entry in plan.tensors:
        if entry.format is None:
            wanted[entry.name] = (entry.shape, FLOAT_DTYPES[entry.kept or ""])
            continue
        found = get_format(entry.format)
        packed, scale, shape = stored_names(entry.name)
        wanted[packed] = ((entry.rows, entry.padded_columns * found.bits // 32), torch.int32)
        wanted[scale] = ((entry.rows, found.groups(entry.columns)), found.scale_dtype)
        wanted[shape] = ((2,), torch.int64)
    offenders = [f"{name} is missing" for name in wanted if name not in files.shapes]
    offenders += [f"{name[:80]} is unexpected" for name in files.names if name not in wanted]
    for name, what in wanted.items():
        if name in files.shapes and (files.shapes[name], files.dtypes[name]) != what:
            needed = f"{dtype_name(what[1])} {list(what[0])}"
            offenders.append(f"{name} is {files.dtypes[name]} {list(files.shapes[name])}, needs {needed}")
    return offenders


def value_offenders(entry: TensorEntry, files: TensorFiles) -> list[str]:
    """What is wrong with the scales and the padded shape of one tensor, or with its kept values."""
    if entry.format is None:
        return [] if all_finite(files.tensor(entry.name)) else [f"{entry.name} holds NaN or infinite values"]
    _, scale, shape = stored_names(entry.name)
    scales, offenders = files.tensor(scale), []
    if not all_finite(scales) or bool(scales.amin() <= 0) or float(scales.amax()) > get_format(entry.format).max_scale:
        offenders.append(f"{scale} holds values that are not positive and finite, or so large that codes overflow")
    if files.tensor(shape).tolist() != [entry.rows, entry.padded_columns]:
        offenders.append(f"{shape} does not hold the padded shape [{entry.rows}, {entry.padded_columns}]")
    return offenders


def code_offenders(entry: TensorEntry, files: TensorFiles) -> list[str]:
    """What is wrong with the codes of one tensor: below their range, or other than 0 in the padding."""
    if entry.format is None:
        return []
    number_format, words, offenders = get_format(entry.format), files.tensor(stored_names(entry.name)[0]), []
    bits, least = number_format.bits, number_format.code_min
    blocks = row_blocks(entry.rows, entry.padded_columns)
    if any(bool(unpack(words[rows], bits).amin() < least) for rows in blocks):
        offenders.append(f"{entry.name} holds codes below {least}")
    first = entry.columns * bits // 32
    if bool(unpack(words[:, first:], bits)[:, entry.columns - first * 32 // bits :].any()):
        offenders.append(f"{entry.name} holds codes other than 0 in its padding")
    return offenders
