# SPDX-License-Identifier: Apache-2.0
"""Bring a Mamba checkpoint in: `mossquant import`.

A Mamba is a MossNet with one SSM expert a layer and no MLP, so that nothing but names changes. Two layouts are read:
Hugging Face's `MambaForCausalLM` folder, and the folder of the original `state-spaces` code. A MossNet folder is taken
too, to add a tokenizer or to change the stored type. Values are copied tensor by tensor, rounded only where another
type is asked for. Letters as in `mossquant.model`.
"""

import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mossquant.checkpoint.checkpoint import seen_text, write_checkpoint
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.tensorfiles import NeededTensor, TensorFiles, all_finite, tensor_offenders
from mossquant.errors import InputError
from mossquant.files.inputs import check_fetched
from mossquant.files.outputs import check_free, new_folder
from mossquant.formats.dtypes import FLOAT_DTYPES, dtype_name
from mossquant.importing.mamba_configs import SourceConfig, read_source_config
from mossquant.importing.names import plain_names
from mossquant.importing.text_files import converted_tokenizer, declared_text
from mossquant.model.config import MossNetConfig, read_config_json
from mossquant.model.mossnet import parameter_count, tensor_specs
from mossquant.model.tensors import TensorSpec
from mossquant.progress import Progress
from mossquant.text.declared import TEXT_FILE, DeclaredText, read_declared_text
from mossquant.text.tokenizer import Tokenizer

_HEAD = "lm_head.weight"
_PICKLED = "pytorch_model.bin"
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_FLOATS = (*FLOAT_DTYPES.values(), torch.float64)

# What torch.load raises for a file that it cannot read, and for one whose pickle makes no sense.
_DAMAGE = (zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Imported:
    """What was brought in.

    Attributes:
        output: the checkpoint folder that was written.
        layout: "Hugging Face", "state-spaces" or "mossnet".
        config: the model's shape.
        torch_dtype: the stored type.
        parameters: how many; a tied table counts once.
        notes: what the user should know, a sentence each.
    """

    output: Path
    layout: str
    config: MossNetConfig
    torch_dtype: str
    parameters: int
    notes: tuple[str, ...]


def import_mamba(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Write the Mamba in `source` as a MossNet checkpoint.

    Args:
        source: folder of a Hugging Face `MambaForCausalLM` (`model.safetensors`, whole or in shards, or
            `pytorch_model.bin`), of the original `state-spaces` code (`pytorch_model.bin`), or of a MossNet.
        output: the folder to write.
        tokenizer: a `tokenizer.json` to take along; without it, the source folder's, if it has one.
        dtype: stored type; without it the source's, or float32 where the source mixes types.
        force: replace what is at `output`.
        progress: called for each tensor with its name, how many are written and how many there are.

    Raises:
        InputError: another kind of model, a config that no MossNet computes, missing, unexpected or misshapen tensors,
            NaN or infinite values, a pickle that holds more than tensors, a tokenizer that does not load or has more
            entries than the model, an output path that is taken. Nothing is written then.
    """
    folder, output = locate(source).require("checkpoint", verb="import"), Path(output)
    check_free(output, force=force, inputs=[folder, *([] if tokenizer is None else [Path(tokenizer)])])
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise InputError.unknown("stored type", dtype, FLOAT_DTYPES)
    read = read_source_config(read_config_json(folder), where=folder / "config.json")
    notes = list(read.notes)
    with tempfile.TemporaryDirectory() as scratch:
        converted = converted_tokenizer(folder, Path(scratch), notes) if tokenizer is None else None
        given = converted if tokenizer is None else Path(tokenizer)
        words = given or (folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None)
        declared = _declared(folder, words, read, notes)
        stored_words = None if words is None else words.read_bytes()
    if words is None and read.config.vocab_size != 256:
        notes.append("no tokenizer.json: the model takes token ids only, until it is imported with --tokenizer FILE")
    tensors = _open(folder)
    names = _names(read, tensors, folder)
    _check_structure(folder, read.config, names, tensors)
    stored = _stored_type(folder, dtype, {tensors.dtypes[name] for name in names.values()}, notes)
    _check_values(folder, read.config, names, tensors, stored)
    training = folder / "training.json" if read.layout == "mossnet" else None
    if training is not None:
        seen_text(folder)  # is taken along, and so must be readable

    written, count = 0, len(tensor_specs(read.config))

    def tensor(spec: TensorSpec) -> Tensor:
        nonlocal written
        written += 1
        if progress is not None:
            progress(spec.name, written, count)
        if spec.name not in names:
            return torch.zeros(spec.shape)  # the bias of a convolution that has none
        return tensors.tensor(names[spec.name])

    with new_folder(output, force=force) as partial:
        write_checkpoint(partial, read.config, tensor, dtype=stored)
        if stored_words is not None:
            (partial / "tokenizer.json").write_bytes(stored_words)
        if declared != DeclaredText():
            (partial / TEXT_FILE).write_text(declared.to_json(), encoding="utf-8", newline="")
        if training is not None and training.is_file():
            shutil.copyfile(training, partial / training.name)
    return Imported(output, read.layout, read.config, dtype_name(stored), parameter_count(read.config), tuple(notes))


def _declared(folder: Path, words: Path | None, read: SourceConfig, notes: list[str]) -> DeclaredText:
    """What the model declares about its text, and whether its tokenizer fits; what is left out joins the notes."""
    vocab_size, ours = read.config.vocab_size, read.layout == "mossnet"
    declared = (read_declared_text(folder, vocab_size) if ours else None) or DeclaredText()
    tokenizer = None if words is None else Tokenizer.from_file(words, declared)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{words} has tokens up to {tokenizer.vocab_size - 1}, and the model has a vocabulary of {vocab_size}: "
            "give the tokenizer that the model was trained with (--tokenizer FILE)"
        )
    if not ours:  # its special tokens have the tokenizer's own ids
        declared, left_out = declared_text(folder, tokenizer, vocab_size)
        notes += left_out
    return declared


def _open(folder: Path) -> "_Tensors":
    if any((folder / name).is_file() for name in _SAFE):
        return TensorFiles(folder)
    if (folder / _PICKLED).is_file():
        return _Pickled(folder / _PICKLED)
    if (folder / f"{_PICKLED}.index.json").is_file():
        raise InputError(
            f"{folder} holds {_PICKLED} in shards, which are not read; save the model as safetensors first"
        )
    raise InputError(f"{folder} holds neither {_SAFE[0]} nor {_PICKLED}; copy the whole folder again")


class _Pickled:
    """The tensors of a `pytorch_model.bin`, all in memory: what `TensorFiles` says of files that are mapped."""

    def __init__(self, path: Path) -> None:
        """Read the file. Nothing in it is run: tensors are all that may be unpickled."""
        check_fetched(path)
        try:
            with zipfile.ZipFile(path) as file:  # torch.save's format since PyTorch 1.6
                # PyTorch compares no checksums, and unpacks whatever size a record says.
                if sum(record.file_size for record in file.infolist()) > path.stat().st_size or file.testzip():
                    raise zipfile.BadZipFile("a record has another checksum or size")
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            cause = next((line for line in str(error).splitlines() if "GLOBAL" in line), "damaged")
            raise InputError(
                f"{path} holds more than tensors ({cause[:160]}), and loading it could run code: refused; "
                "get the file from its author again, or as safetensors"
            ) from None
        except _DAMAGE as error:
            cause = (str(error).splitlines() or [""])[0]
            raise InputError(f"{path} is not a whole file of torch.save ({cause[:120]}); copy it again") from None
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise InputError(f"{path} holds a {kind}, not named tensors; save the state_dict of the model")
        offenders = [
            f"{str(name)[:80]} is no dense tensor on the CPU"
            for name, value in content.items()
            if not (isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu")
        ]
        if offenders:
            what = f"{path} holds more than named tensors"
            raise InputError.listing(what, offenders, "Save the state_dict of the model.")
        self._content: dict[str, Tensor] = {str(name): tensor.detach() for name, tensor in content.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._content.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._content.items()}

    def tensor(self, name: str) -> Tensor:
        return self._content[name]


_Tensors = TensorFiles | _Pickled


def _names(read: SourceConfig, tensors: _Tensors, folder: Path) -> dict[str, str]:
    """Our name → the source's; a tensor that we fill with zeros is left out, a tied head that is there is in."""
    plain = plain_names(tensors.shapes, str(folder))
    specs = [spec.name for spec in tensor_specs(read.config) if read.conv_bias or spec.role != "ssm.conv_bias"]
    if set(specs) - set(plain) == {_HEAD} and len(plain) < len(specs):
        raise InputError(
            f"{folder} holds the model without its head ({_HEAD}), which its config.json says is not tied to the "
            "embedding; save the whole model (MambaForCausalLM)"
        )
    head = [_HEAD] if _HEAD in plain else []
    return {name: plain.get(name, name) for name in dict.fromkeys([*specs, *head])}


def _check_structure(folder: Path, config: MossNetConfig, names: Mapping[str, str], tensors: _Tensors) -> None:
    shapes = {spec.name: spec.shape for spec in tensor_specs(config)}
    table = shapes["backbone.embeddings.weight"]  # of a tied head too, which `_check_values` compares
    needed = {stored: NeededTensor(shapes.get(name, table), _FLOATS) for name, stored in names.items()}
    _refuse(folder, tensor_offenders(needed, tensors.shapes, tensors.dtypes))


def _check_values(
    folder: Path, config: MossNetConfig, names: Mapping[str, str], tensors: _Tensors, stored: torch.dtype
) -> None:
    offenders = []
    for name in names.values():
        tensor = tensors.tensor(name)
        if not all_finite(tensor):
            offenders.append(f"{name} holds NaN or infinite values")
        elif tensor.dtype != stored and not all_finite(tensor.to(stored)):
            offenders.append(f"{name} holds values too large for {dtype_name(stored)}")
    if config.tie_word_embeddings and _HEAD in names:
        head, table = names[_HEAD], names["backbone.embeddings.weight"]
        same_type = tensors.dtypes[head] == tensors.dtypes[table]
        if not same_type or not torch.equal(tensors.tensor(head), tensors.tensor(table)):
            offenders.append(f"{head} differs from {table}, though the config says that they are tied")
    _refuse(folder, offenders)


def _refuse(folder: Path, offenders: list[str]) -> None:
    if offenders:
        raise InputError.listing(f"{folder} does not fit its config.json", offenders, "Copy or save the model again.")


def _stored_type(folder: Path, asked: str | None, dtypes: set[torch.dtype], notes: list[str]) -> torch.dtype:
    """The type to store: the one asked for, the source's only one, or float32."""
    if asked is not None:
        return FLOAT_DTYPES[asked]
    if torch.float64 in dtypes:
        raise InputError(
            f"{folder} is stored in float64, which no checkpoint of ours is; pass --dtype float32 to round it"
        )
    if len(dtypes) > 1:
        notes.append(f"stored as float32, since the source mixes {' and '.join(sorted(map(dtype_name, dtypes)))}")
        return torch.float32
    return next(iter(dtypes))
