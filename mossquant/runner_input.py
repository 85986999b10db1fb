# SPDX-License-Identifier: Apache-2.0
"""Checks of what a Runner is given, the same for every Runner, before a state is consumed."""

from collections.abc import Mapping

from mossquant.errors import InputError
from mossquant.runner import Arrays, State, Tokens

__all__ = ["checked_arrays", "checked_batch", "checked_tokens"]


def checked_batch(batch: int) -> int:
    """The batch that a state is asked for.

    Raises:
        InputError: less than one stream.
    """
    if batch < 1:
        raise InputError(f"a batch of {batch} streams was asked for; ask for one or more")
    return batch


def checked_tokens(tokens: Tokens, state: State, vocab_size: int) -> None:
    """Check what a Runner is given, before its state is consumed.

    Raises:
        InputError: not an integer array [B, T] with T ≥ 1, a batch other than the state's, or tokens outside 0..V−1.
    """
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise InputError(f"tokens have shape {list(tokens.shape)} and type {tokens.dtype}; give integers [batch, time]")
    if tokens.shape[0] != state.batch:
        raise InputError(f"tokens have batch {tokens.shape[0]} and the state has {state.batch}; give both the same one")
    if tokens.shape[1] == 0:
        raise InputError("no tokens were given; give one or more")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"token {wrong} is outside the vocabulary of {vocab_size}; use the model's own tokenizer")


def checked_arrays(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Check state arrays [B, …] against their names and shapes (without the batch axis); returns B.

    Raises:
        InputError: missing, unexpected or misshapen arrays, or batches that differ; all offenders at once.
    """
    batches: set[int] = {value.shape[0] for value in arrays.values() if value.ndim > 0}
    offenders = [f"{name} is missing" for name in shapes if name not in arrays]
    offenders += [f"{name[:80]} is unexpected" for name in arrays if name not in shapes]
    for name, shape in shapes.items():
        if name in arrays and (arrays[name].ndim == 0 or arrays[name].shape[1:] != shape):
            offenders.append(f"{name} has shape {list(arrays[name].shape)}, needs {['batch', *shape]}")
    if not offenders and len(batches) > 1:
        offenders.append(f"batches of {', '.join(map(str, sorted(batches)))} are mixed")
    if not offenders and 0 in batches:
        offenders.append("a batch of 0")
    if offenders:
        advice = "Give a state that this model's read() gave."
        raise InputError.listing("the state does not fit the model", offenders, advice)
    return batches.pop()
