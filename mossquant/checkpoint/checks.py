# SPDX-License-Identifier: Apache-2.0
"""What can be wrong in a quantized checkpoint: ledger against config, tensor files against ledger, scales, codes."""

from collections.abc import Mapping
from dataclasses import replace

from mossquant.checkpoint.packing import stored_layout, stored_names, unpack
from mossquant.checkpoint.tensorfiles import NeededTensor, TensorFiles, all_finite, tensor_offenders
from mossquant.files.space import row_blocks
from mossquant.formats import FORMATS, get_format
from mossquant.formats.activations import ACTIVATION_FORMATS
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.formats.states import STATE_FORMATS
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import activation_sites, parameter_count, state_specs
from mossquant.model.tensors import SiteSpec, Stored, TensorSpec
from mossquant.plan.entries import SiteEntry, TensorEntry
from mossquant.plan.plan import Plan, activation_blocks


def plan_offenders(config: MossNetConfig, specs: Mapping[str, TensorSpec], plan: Plan) -> list[str]:
    """What a ledger says that cannot be true of a model of this config."""
    if [entry.name for entry in plan.tensors] != list(specs):
        return ["ledger.json lists other tensors than config.json asks for"]
    offenders = [
        f"ledger.json: {entry.name} has a role, shape, format or size that it cannot have"
        for entry in plan.tensors
        if not _tensor_fits(specs[entry.name], entry)
    ]
    sites = activation_sites(config)
    if [site.name for site in plan.activations] != [site.name for site in sites]:
        return [*offenders, "ledger.json lists other activation sites than config.json asks for"]
    offenders += [
        f"ledger.json: {entry.name} cannot have format {entry.format[:40]!r} and block {entry.block}"
        for site, entry in zip(sites, plan.activations, strict=True)
        if not offenders and not _site_fits(site, entry, plan)
    ]
    states = [(spec.name, spec.role, spec.shape) for spec in state_specs(config)]
    if [(entry.name, entry.role, entry.shape) for entry in plan.state] != states:
        offenders.append("ledger.json lists other state arrays than config.json asks for")
    if any(entry.format not in STATE_FORMATS for entry in plan.state):
        offenders.append("ledger.json has unknown state formats")
    if not parameter_count(config) <= plan.parameters < 1 << 63:
        offenders.append(f"ledger.json says {plan.parameters} parameters, the model has {parameter_count(config)}")
    return offenders


def _tensor_fits(spec: TensorSpec, entry: TensorEntry) -> bool:
    """Whether an entry is what a plan and a run make of the tensor, as far as that follows from its format."""
    quantized = entry.format in FORMATS and entry.kept is None and entry.solver is not None
    kept = entry.format is None and entry.kept in FLOAT_DTYPES and entry.solver is None
    sizes = {spec.count * dtype.itemsize for dtype in FLOAT_DTYPES.values()}
    error = entry.relative_error
    if not (quantized or kept) or entry.stored_bytes not in sizes or error is None or error < 0:
        return False
    planned = TensorEntry.of(
        spec, entry.storage, stored_bytes=entry.stored_bytes, reason=entry.reason, solver=entry.solver
    )
    if kept and entry.note is not None:
        return False
    decay = entry.decay_error
    if decay is not None and (spec.stored is not Stored.LOG_OF_DECAY or not 0 <= decay.mean <= decay.largest <= 1):
        return False
    return entry == replace(
        planned, written_bytes=planned.predicted_bytes, relative_error=error, note=entry.note, decay_error=decay
    )


def _site_fits(site: SiteSpec, entry: SiteEntry, plan: Plan) -> bool:
    """Whether an entry is what a plan makes of the site, as far as that follows from its format."""
    if entry.format not in ACTIVATION_FORMATS:
        return False
    blocks = activation_blocks(site, {name: plan.by_name[name].format for name in site.tensors})
    one_block = len(blocks) == 1 or not ACTIVATION_FORMATS[entry.format].blocked
    return one_block and entry == SiteEntry.of(site, entry.format, blocks=blocks, reason=entry.reason)


def structure_offenders(plan: Plan, files: TensorFiles) -> list[str]:
    """What tensor files hold that the ledger does not say: names, shapes, types."""
    needed: dict[str, NeededTensor] = {}
    for entry in plan.tensors:
        if entry.format is None:
            needed[entry.name] = NeededTensor(entry.shape, (FLOAT_DTYPES[entry.kept or ""],))
            continue
        layout = stored_layout(entry.name, get_format(entry.format), entry.rows, entry.columns)
        needed |= {name: NeededTensor(shape, (dtype,)) for name, (shape, dtype) in layout.items()}
    return tensor_offenders(needed, files.shapes, files.dtypes)


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
