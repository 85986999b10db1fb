# SPDX-License-Identifier: Apache-2.0
"""`train`: from a preset and text to a checkpoint, through a work folder that a killed run goes on from."""

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.device import check_device
from mossquant.errors import InputError
from mossquant.files.outputs import check_free, check_outside, new_folder
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.config import MossNetConfig, preset
from mossquant.text.stdlib_text import join_modules, training_text
from mossquant.text.text import LARGEST_TRAINING_TEXT, Text, Tokenizer, read_text, train_tokenizer
from mossquant.training.trainer import Schedule, Trainer, TrainingStep

STDLIB = "python-stdlib"
"""Name of the bundled model's training text: the running interpreter's standard library, less what is held out."""

_BYTE_VOCABULARY = 256
_SNAPSHOT = "snapshot.safetensors"


@dataclass(frozen=True)
class Trained:
    """What came out: the folder, tokens seen, and the mean loss of the last hundred steps (nats a token)."""

    output: Path
    tokens: int
    loss: float


def train(
    preset_name: str,
    text: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: Literal["bpe", "bytes"] = "bpe",
    schedule: Schedule | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
    work: str | Path | None = None,
    force: bool = False,
    snapshot_every: int = 100,
    shown: Callable[[TrainingStep], None] | None = None,
    said: Callable[[str], None] | None = None,
) -> Trained:
    """Train a preset on text and write the checkpoint.

    Tokenizer and snapshots are kept in a work folder (`OUTPUT.training` unless `work` names one); the same call again
    encodes the text again and goes on from the last snapshot, to the bit. Remove the folder to start afresh.

    Args:
        preset_name: a key of `mossquant.model.config.PRESETS`.
        text: paths of text files, or `python-stdlib` for the bundled model's own training text.
        output: folder to write; `force` replaces one that is there.
        tokenizer: train a byte-level BPE of the preset's vocabulary size on the text, or read bytes (vocabulary 256).
        schedule: how long and how fast; None: 5,000 steps.
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
    config, output, schedule = preset(preset_name), Path(output), schedule or Schedule(steps=5000)
    check_free(output, force=force, inputs=[Path(item) for item in text if item != STDLIB])
    if not text:
        raise InputError(f"no text to train on; give --text PATH, or --text {STDLIB} for the bundled model's own")
    check_device(device)
    say = said or (lambda line: None)
    documents, texts = _documents(text, as_bytes=tokenizer == "bytes")
    # No tokenizer makes more tokens than bytes, and an end for each document: said before one is trained.
    most = sum(len(data) for data in documents) + (len(documents) if tokenizer == "bpe" else 0)
    if most < schedule.least_tokens:
        raise InputError(
            f"the training text has {most} bytes, {schedule.least_tokens} tokens are needed for one step; "
            "give more text, or a smaller --batch or --window"
        )
    folder = Path(work) if work is not None else output.with_name(f"{output.name}.training")
    if folder.absolute().is_relative_to(output.absolute()):
        raise InputError(f"the work folder {folder} would lie in the output {output}; choose another one with --work")
    snapshot = folder / _SNAPSHOT
    with _work_folder(folder):
        encoder, config, words = _tokenizer(tokenizer, documents, texts, config, folder, say)
        say("encoding the text")
        tokens = encoder.encode_documents(documents)
        say(f"{len(tokens)} tokens of {sum(map(len, documents))} bytes")
        trainer = Trainer(config, tokens, schedule, device=device)
        if snapshot.is_file():
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
    stored, model = FLOAT_DTYPES[dtype], trainer.model.cpu()
    with new_folder(output, force=force) as partial:
        write_checkpoint(partial, config, model.parameter_of, dtype=stored, training=record)
        if words is not None:
            (partial / "tokenizer.json").write_bytes(words.read_bytes())
    return Trained(output, seen, loss)


@contextmanager
def _work_folder(folder: Path) -> Iterator[None]:
    """Make the work folder. It stays, also when the block is stopped; but not where the block refuses its input."""
    check_outside(folder / _SNAPSHOT)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise InputError(f"{folder} is not a folder, nor can it be one; choose another one with --work") from None
    try:
        yield
    except InputError:
        for path in made:  # what others wrote there meanwhile is theirs
            if not any(path.iterdir()):
                path.rmdir()
        raise


def _documents(text: Sequence[str | Path], *, as_bytes: bool) -> tuple[list[bytes], list[Text]]:
    """The documents in order, and the texts that they come from (what the checkpoint records)."""
    documents: list[bytes] = []
    texts: list[Text] = []
    for item in text:
        if item == STDLIB:
            modules = [data for _, data in training_text()]
            documents += modules
            texts.append(Text.of(STDLIB, join_modules(modules)))
        else:
            read = read_text(Path(item), as_bytes=as_bytes, largest=LARGEST_TRAINING_TEXT)
            documents.append(read.data)
            texts.append(replace(read, name=Path(item).name))
    return documents, texts


def _tokenizer(
    kind: str,
    documents: list[bytes],
    texts: list[Text],
    config: MossNetConfig,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[Tokenizer, MossNetConfig, Path | None]:
    """The tokenizer, the config with its vocabulary, and the tokenizer's file (none for bytes)."""
    if kind == "bytes":
        return Tokenizer.byte_level(), replace(config, vocab_size=_BYTE_VOCABULARY), None
    made_from = "\n".join([str(config.vocab_size), *(text.sha256 for text in texts)])
    path = folder / f"tokenizer-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return Tokenizer.from_file(path), config, path
    say(f"training a tokenizer of {config.vocab_size} entries")
    return train_tokenizer((data.decode() for data in documents), config.vocab_size, path), config, path
