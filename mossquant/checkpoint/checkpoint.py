# SPDX-License-Identifier: Apache-2.0
"""A full-precision MossNet on disk: config and named tensors, memory-mapped, checked against one another.

The folder holds `config.json`, `model.safetensors` (or shards with an index), and where there are any `tokenizer.json`,
`text.json` (what the model declares about its text) and `training.json` (how it was made, with the hashes of the texts
that it has seen).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from mossquant.checkpoint.manifest import Sha256
from mossquant.checkpoint.tensorfiles import NeededTensor, TensorFiles, TensorWriter, all_finite, tensor_offenders
from mossquant.checkpoint.weights import BESIDE, Origin, Weights, value
from mossquant.errors import InputError
from mossquant.files.json import read_stored
from mossquant.files.outputs import file_sha256, write_json
from mossquant.formats import NumberFormat, QuantizedTensor
from mossquant.formats.dtypes import FLOAT_DTYPES, dtype_name
from mossquant.model.config import MossNetConfig, read_config_json
from mossquant.model.mossnet import MossNet, parameter_count, tensor_specs
from mossquant.model.tensors import TensorSpec

_TRAINING = "training.json"


class _SeenText(BaseModel):
    sha256: Sha256


class _TrainingRecord(BaseModel):
    """The part of `training.json` that is read."""

    text: list[_SeenText]


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision model: `mossquant.checkpoint.weights.Weights` of which every tensor is kept.

    Attributes:
        folder: where it lies.
        config: its shape.
        torch_dtype: stored type of the weights ("bfloat16").
        specs: tensor name → what it is, in processing order.
        path: the folder as the user named it.
    """

    folder: Path
    config: MossNetConfig
    torch_dtype: str
    specs: Mapping[str, TensorSpec]
    path: str
    _files: TensorFiles

    @classmethod
    def open(cls, folder: Path, *, path: str | None = None) -> "Checkpoint":
        """Open a checkpoint and check every tensor against the config.

        Args:
            folder: the checkpoint folder.
            path: how the user named it, the folder if not given.

        Raises:
            InputError: unreadable files; missing or unexpected tensors, wrong shapes or dtypes, NaN or infinite values:
                all offenders at once, each by name. Also a quantized checkpoint.
        """
        values = read_config_json(folder)
        if "quantization_config" in values:
            raise InputError(f"{folder} is quantized already; give the full-precision checkpoint that it was made from")
        config = MossNetConfig.from_json(values, where=str(folder / "config.json"))
        torch_dtype = values.get("torch_dtype", "float32")
        files = TensorFiles(folder)
        specs = {spec.name: spec for spec in tensor_specs(config)}
        dtypes = (FLOAT_DTYPES[torch_dtype], torch.float32)
        needed = {name: NeededTensor(spec.shape, dtypes) for name, spec in specs.items()}
        offenders = tensor_offenders(needed, files.shapes, files.dtypes)
        if not offenders:
            broken = [name for name in specs if not all_finite(files.tensor(name))]
            offenders = [f"{name} holds NaN or infinite values" for name in broken]
        if offenders:
            advice = "Copy or save it again; names with a prefix (torch.compile, DDP) come in with `mossquant import`."
            raise InputError.listing(f"{folder} does not fit its config.json", offenders, advice)
        return cls(folder, config, torch_dtype, specs, path or str(folder), files)

    @cached_property
    def origin(self) -> Origin:
        """What it is, with the hashes of its files: each is read once for it.

        Raises:
            InputError: the training record cannot be understood.
        """
        stored = sum(spec.count * self._files.dtypes[name].itemsize for name, spec in self.specs.items())
        return Origin(
            path=self.path,
            kind="checkpoint",
            recipe=None,
            torch_dtype=self.torch_dtype,
            parameters=parameter_count(self.config),
            payload_bytes=stored,
            file_bytes=sum((self.folder / name).stat().st_size for name in self._files.files),
            files={name: file_sha256(self.folder / name) for name in ["config.json", *self._files.files]},
            training_text=seen_text(self.folder),
            calibration_text=(),
            beside=tuple(path for name in BESIDE if (path := self.folder / name).is_file()),
        )

    def format(self, name: str) -> NumberFormat | None:
        """None."""
        return None

    def quantized(self, name: str) -> QuantizedTensor:
        """Nothing is."""
        raise ValueError(f"{name} is not quantized; use kept(name)")

    def kept(self, name: str) -> Tensor:
        """One tensor as stored, read from the mapped file."""
        return self._files.tensor(name)

    def activation(self, site: str) -> str:
        """fp32."""
        return "fp32"

    def state(self, name: str) -> str:
        """fp32."""
        return "fp32"


def seen_text(folder: Path) -> tuple[str, ...]:
    """SHA-256 of the texts named in a folder's `training.json`; none where there is no such file.

    Raises:
        InputError: the file is there but cannot be understood.
    """
    path = folder / _TRAINING
    if not path.is_file():
        return ()
    advice = "Copy the checkpoint folder again."
    record = read_stored(path, _TrainingRecord, noun="a record that says which texts were seen", advice=advice)
    return tuple(text.sha256 for text in record.text)


def write_checkpoint(
    folder: Path,
    config: MossNetConfig,
    tensor: Callable[[TensorSpec], Tensor],
    *,
    dtype: torch.dtype,
    mixed: Mapping[str, torch.dtype] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint into an existing, empty folder (itself written aside: `mossquant.files.outputs`).

    Args:
        folder: where to write.
        config: the model's shape.
        tensor: gives each tensor in turn.
        dtype: stored type.
        mixed: tensor name → the type of those that are stored in another one, which can only be fp32.
        training: content of `training.json`.
    """
    specs = tensor_specs(config)
    write_json(folder / "config.json", config.to_json(torch_dtype=dtype_name(dtype)))
    types = {spec.name: (mixed or {}).get(spec.name, dtype) for spec in specs}
    writer = TensorWriter(folder, total_bytes=sum(spec.count * types[spec.name].itemsize for spec in specs))
    for spec in specs:
        writer.add(spec.name, tensor(spec).to(types[spec.name]))
    writer.close()
    if training is not None:
        write_json(folder / _TRAINING, dict(training))


def load_model(weights: Weights, *, dtype: torch.dtype = torch.float32) -> MossNet:
    """The PyTorch model with these weights: values that were kept, or that codes mean, converted to `dtype`."""
    return MossNet(weights.config, dtype=dtype).load(lambda name: value(weights, name))
