# SPDX-License-Identifier: Apache-2.0
"""`export`: lower a checkpoint, quantized or not, to an artifact of one target or of several; and what that needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.outputs import check_free, new_folder
from mossquant.files.space import check_space
from mossquant.plan.capabilities import Activations
from mossquant.progress import Progress
from mossquant.release import release
from mossquant.targets.artifact import MANIFEST, Artifact, read_artifact_manifest, write_artifact_manifest
from mossquant.targets.taken import check_held
from mossquant.targets.target import Prepared, get_target, program_targets
from mossquant.text.declared import TEXT_FILES
from mossquant.text.tokenizer_checks import check_tokenizer_size

_MANIFEST_BYTES = 1 << 17
"""Of a manifest: it names files, operators, inputs and outputs."""


@dataclass(frozen=True)
class Needs:
    """What an export takes.

    Attributes:
        targets: target → (bytes of disk, at most; bytes of memory beside the interpreter's own, at most). Targets are
            lowered one after the other, so that their memory does not add up.
        beside_bytes: of disk, for tokenizer and manifest.
    """

    targets: dict[str, tuple[int, int]]
    beside_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Room that the artifact takes, at most."""
        return self.beside_bytes + sum(disk for disk, _ in self.targets.values())

    @property
    def memory_bytes(self) -> int:
        """Anonymous memory that making it takes, at most, beside the interpreter's own with its imports."""
        return max(memory for _, memory in self.targets.values())


def export_needs(
    model: str | Path | Weights,
    *,
    target: str | Sequence[str] = "onnx",
    activations: Activations | None = None,
    scales: str | None = None,
    isa: str | None = None,
    kernels: str | None = None,
) -> Needs:
    """What `export` would need; arguments and errors are those of `export`. Writes nothing."""
    names = _named(target)
    options = _checked_options(names, scales=scales, isa=isa, kernels=kernels)
    weights = open_weights(model, verb="export", check_codes=True)
    return _needs(weights, _prepare(weights, names, activations, None, options))


def export(
    model: str | Path | Weights,
    output: str | Path,
    *,
    target: str | Sequence[str] = "onnx",
    activations: Activations | None = None,
    scales: str | None = None,
    isa: str | None = None,
    kernels: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Lower a model to an artifact: programs, tokenizer and manifest, in one folder.

    Lowering never changes a value: the codes and scales of a quantized checkpoint are those of the artifact. The same
    model, release and options give the same bytes.

    Args:
        model: a quantized checkpoint folder; or a full-precision one, or "tiny": its artifact is the full-precision
            program to compare with; or weights.
        output: folder to write; nothing may be there, unless `force`.
        target: what to lower to: "onnx", "executorch", "native", or several of them.
        activations: format of the inputs of quantized linears: "int8", as the target rounds them at run time, or
            "fp32"; None takes what the plan of the quantized checkpoint says, or the target's own int8 where the plan
            says one that it does not have.
        scales: of onnx: "folded", which None is too: in their own type, made fp32 when onnxruntime folds constants; or
            "initializers": larger, as fast without folding (docs/onnx.md).
        isa: of native, and of executorch with kernels of ours: what matrices are packed for: "host", which None is too,
            the machine that exports; "x86", "arm", or "rows", for none in particular. A .moss of any of them runs on
            any machine, which packs anew if it wants another; a .pte runs on those that want this.
        kernels: of executorch: "stock", which None is too: XNNPACK and ExecuTorch's own; or "mossquant": libmoss', as
            operators that an app has to link (docs/executorch.md).
        force: replace what is at `output`.
        progress: called after each tensor, or stage.

    Returns:
        The artifact, with notes for the user.

    Raises:
        InputError: a bad model or an artifact, an unknown target, a plan that a target cannot hold, int8 activations
            for a full-precision checkpoint, an output that cannot be written, too little disk or memory: before any
            work.
    """
    names, destination = _named(target), Path(output)
    options = _checked_options(names, scales=scales, isa=isa, kernels=kernels)
    inputs = [locate(model).path] if isinstance(model, str | Path) else []
    check_free(destination, force=force, inputs=inputs)
    weights = open_weights(model, verb="export", check_codes=True)
    prepared = _prepare(weights, names, activations, progress, options)
    needs = _needs(weights, prepared)
    dropped = _programs_there(destination) - set(names)
    check_space(destination, disk_bytes=needs.disk_bytes, memory_bytes=needs.memory_bytes)
    with new_folder(destination, force=force) as partial:
        exported = {name: lowering.write(partial) for name, lowering in prepared.items()}
        for path in weights.origin.beside:
            if path.name in TEXT_FILES:
                (partial / path.name).write_bytes(path.read_bytes())
        programs = {name: program.program for name, program in exported.items()}
        manifest = write_artifact_manifest(partial, release=release(), programs=programs)
    notes = [note for program in exported.values() for note in program.notes]
    if dropped:
        both = ",".join([*names, *sorted(dropped)])
        notes.append(f"the {' and '.join(sorted(dropped))} program that was there is gone; --target {both} makes both")
    return Artifact(destination, manifest, tuple(notes))


def _programs_there(folder: Path) -> set[str]:
    """Targets of the artifact that is replaced, if one is."""
    try:
        return set(read_artifact_manifest(folder / MANIFEST).programs)
    except InputError:
        return set()


def _named(target: str | Sequence[str]) -> list[str]:
    """Names of targets that can be lowered to.

    Raises:
        InputError: no target, one named twice, or unknown ones; the known ones are listed.
    """
    names, known = [target] if isinstance(target, str) else list(target), program_targets()
    if not names:
        raise InputError(f"no target was given; known targets: {', '.join(known)}")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError(f"target {twice[0][:40]!r} is named twice; name each once")
    unknown = [repr(name[:40]) for name in names if name not in known]
    if unknown:
        raise InputError(f"unknown target {', '.join(unknown)}; known targets: {', '.join(known)}")
    return names


def _checked_options(names: Sequence[str], **given: str | None) -> dict[str, str]:
    """The options that were given, each one of a target in `names`.

    Raises:
        InputError: no such target has the option, or not with this value.
    """
    options = {option: value for option, value in given.items() if value is not None}
    for option, value in options.items():
        having = {name: own for name in program_targets() if (own := get_target(name).choices(option, options))}
        known = [choice for name, choices in having.items() if name in names for choice in choices]
        if not known:
            beside = [
                f"--{other} {choice}"
                for target in map(get_target, names)
                for other in given
                for choice in target.choices(other, options)
                if target.choices(option, options | {other: choice})
            ]
            advice = ", ".join(["leave it out", *(f"or add {of}" for of in beside[:1])])
            raise InputError(f"--{option} is for {', '.join(having)} and not for {', '.join(names)}; {advice}")
        if value not in known:
            raise InputError.unknown(f"--{option} value", value, known)
    return options


def _prepare(
    weights: Weights,
    names: Sequence[str],
    activations: Activations | None,
    progress: Progress | None,
    options: Mapping[str, str],
) -> dict[str, Prepared]:
    """Check all that can be checked before any work."""
    origin = weights.origin
    if origin.recipe is None and activations == "int8":
        raise InputError(
            f"{origin.path} is not quantized, and int8 activations meet quantized weights only; "
            "leave --activations out, or run `mossquant quantize` first"
        )
    held = [get_target(name).capabilities(options) for name in names]
    check_held(weights, held, planned_activations=activations is None)
    return {
        name: get_target(name).prepare(weights, activations=activations, progress=progress, options=options)
        for name in names
    }


def _needs(weights: Weights, prepared: dict[str, Prepared]) -> Needs:
    tokenizer = weights.origin.tokenizer
    if tokenizer is not None:
        check_tokenizer_size(tokenizer)
    return Needs(
        {name: (lowering.disk_bytes, lowering.memory_bytes) for name, lowering in prepared.items()},
        _MANIFEST_BYTES + (tokenizer.stat().st_size if tokenizer is not None else 0),
    )
