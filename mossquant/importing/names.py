# SPDX-License-Identifier: Apache-2.0
"""Names of tensors as wrappers of PyTorch and the base model's class write them, read as those of the whole model."""

from collections.abc import Iterable

from mossquant.errors import InputError

# torch.compile; DataParallel, DistributedDataParallel and DeepSpeed; FSDP; activation checkpointing.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What a `MambaModel` or `MixerModel`, saved without the model around it, begins with.
_BASE = ("embedding.", "embeddings.", "layers.", "norm_f.")


def plain_name(name: str) -> str:
    """The name without wrappers, wherever they stand, and with `backbone.` in front, where that was left out.

    The original's `embedding` becomes `embeddings`, as in Hugging Face.
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    if name.startswith(_BASE):
        name = f"backbone.{name}"
    return name.replace("backbone.embedding.", "backbone.embeddings.", 1)


def plain_names(stored: Iterable[str], where: str) -> dict[str, str]:
    """Plain name → the one that is stored. Raises `InputError`, naming `where`: two are the same tensor's."""
    plain: dict[str, str] = {}
    offenders = []
    for name in sorted(stored):
        first = plain.setdefault(plain_name(name), name)
        if first != name:
            offenders.append(f"{first[:80]} and {name[:80]}")
    if offenders:
        what = f"{where} holds tensors under two names, which may differ"
        raise InputError.listing(what, offenders, "Save the model with one of the two.")
    return plain
