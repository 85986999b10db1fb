# SPDX-License-Identifier: Apache-2.0
"""`train`: from a preset and text to a checkpoint, through a work folder that a killed run goes on from."""

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mossquant.checkpoint import DTYPE_NAMES, write_checkpoint
from mossquant.config import MossNetConfig, preset
from mossquant.errors import InputError
from mossquant.outputs import check_free, new_file, new_folder
from mossquant.stdlib_text import training_text
from mossquant.text import Text, Tokenizer, read_text, train_tokenizer
from mossquant.tokenizer import Tokens
from mossquant.trainer import Progress, Schedule, Trainer

__all__ = ["STDLIB", "Trained", "train"]

STDLIB = "python-stdlib"
"""Name of the bundled model's training text: the running interpreter's standard library, less what is held out."""

_BYTE_VOCABULARY = 256


@dataclass(frozen=True)
class Trained:
    """What came out: the folder, tokens seen, and the mean loss of the last hundred steps (nats a token)."""

    output: Path
    tokens: int
    loss: float


def train(
    preset_name: str,
    text: Sequence[str],
    output: Path,
    *,
    tokenizer: Literal["bpe", "bytes"] = "bpe",
    schedule: Schedule,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
    work: Path | None = None,
    force: bool = False,
    snapshot_every: int = 100,
    shown: Callable[[Progress], None] | None = None,
    said: Callable[[str], None] | None = None,
) -> Trained:
    """Train a preset on text and write the checkpoint.

    Tokenizer, encoded text and snapshots are kept in a work folder (`OUTPUT.training` unless `work` names one); the
    same call again goes on from the last snapshot, to the bit. Remove the folder to start afresh.

    Args:
        preset_name: a key of `mossquant.config.PRESETS`.
        text: paths of text files, or `python-stdlib` for the bundled model's own training text.
        output: folder to write; `force` replaces one that is there.
        tokenizer: train a byte-level BPE of the preset's vocabulary size on the text, or read bytes (vocabulary 256).
        schedule: how long and how fast.
        device: "cpu" or "cuda".
        dtype: stored type of the checkpoint.
        work: the work folder.
        snapshot_every: steps between snapshots.
        shown: called after every step.
        said: called with one line about each thing done before training.

    Raises:
        InputError: unknown preset; unreadable or too short text; no CUDA device; an output that exists; a work folder
            of another run.
    """
    config = preset(preset_name)
    check_free(output, force=force)
    if not text:
        raise InputError(f"no text to train on; give --text PATH, or --text {STDLIB} for the bundled model's own")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for and PyTorch finds no CUDA device; use --device cpu")
    say = said or (lambda line: None)
    documents, texts = _documents(text, as_bytes=tokenizer == "bytes")
    folder = work or output.with_name(f"{output.name}.training")
    folder.mkdir(parents=True, exist_ok=True)
    encoder, config = _tokenizer(tokenizer, documents, config, folder, say)
    tokens = _tokens(encoder, documents, texts, folder, say)
    trainer = Trainer(config, tokens, schedule, device=device)
    snapshot = folder / "snapshot.safetensors"
    if snapshot.exists():
        trainer.restore(snapshot)
        say(f"going on from step {trainer.step} of {schedule.steps}")
    trainer.run(snapshot=snapshot, every=snapshot_every, shown=shown)
    seen = schedule.steps * schedule.batch * schedule.window
    loss = float(np.mean(trainer.losses[-100:]))
    record: dict[str, Any] = {
        "version": 1,
        "preset": preset_name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
        "schedule": asdict(schedule),
        "tokens_in_text": len(tokens),
        "tokens_seen": seen,
        "last_loss_nats_per_token": round(loss, 4),
        "tokenizer_sha256": encoder.sha256,
        "text": [{"name": item.name, "bytes": len(item.data), "sha256": item.sha256} for item in texts],
    }
    stored = {name: torch_dtype for torch_dtype, name in DTYPE_NAMES.items()}[dtype]
    model = trainer.model.cpu()
    with new_folder(output, force=force) as partial:
        write_checkpoint(
            partial,
            config,
            model.parameter_of,
            dtype=stored,
            training=record,
            copies=[] if tokenizer == "bytes" else [folder / "tokenizer.json"],
        )
    return Trained(output, seen, loss)


def _documents(text: Sequence[str], *, as_bytes: bool) -> tuple[list[bytes], list[Text]]:
    """The documents in order, and the texts that they come from (what the checkpoint records)."""
    documents: list[bytes] = []
    texts: list[Text] = []
    for item in text:
        if item == STDLIB:
            modules = [data for _, data in training_text()]
            documents += modules
            texts.append(Text.of(STDLIB, b"".join(data + b"\n" for data in modules)))
        else:
            read = read_text(Path(item), as_bytes=as_bytes)
            documents.append(read.data)
            texts.append(replace(read, name=Path(item).name))
    return documents, texts


def _tokenizer(
    kind: str, documents: list[bytes], config: MossNetConfig, folder: Path, say: Callable[[str], None]
) -> tuple[Tokenizer, MossNetConfig]:
    if kind == "bytes":
        return Tokenizer.byte_level(), replace(config, vocab_size=_BYTE_VOCABULARY)
    path = folder / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(path), config
    say(f"training a tokenizer of {config.vocab_size} entries")
    return train_tokenizer((data.decode() for data in documents), config.vocab_size, path), config


def _tokens(
    encoder: Tokenizer, documents: list[bytes], texts: list[Text], folder: Path, say: Callable[[str], None]
) -> Tokens:
    key = hashlib.sha256("\n".join([encoder.sha256 or "bytes", *(item.sha256 for item in texts)]).encode()).hexdigest()
    path = folder / f"tokens-{key[:16]}.safetensors"
    if not path.exists():
        say("encoding the text")
        with new_file(path) as partial:
            save_file({"tokens": encoder.encode_documents(documents).astype(np.int32)}, partial)
    tokens: Tokens = load_file(path)["tokens"].astype(np.int64)
    say(f"{len(tokens)} tokens of {sum(len(data) for data in documents)} bytes")
    return tokens
