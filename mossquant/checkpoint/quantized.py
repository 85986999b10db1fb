# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint on disk: packed tensors, what was asked, what happened, and what it was made from.

    config.json         the model's config, with compressed-tensors' `quantization_config`
    model.safetensors   codes, scales, padded shapes (`….packing`), and tensors that are kept; or shards
    recipe.yaml         what was asked, as written
    ledger.json         what happened to each tensor (`mossquant.plan.plan`), with true and padded shapes
    manifest.json       sha256 and size of each file, versions, the parent's hashes, texts that the model has seen
    tokenizer.json, training.json    copied from the checkpoint, where there are any

Opening checks all of it: nothing is believed that can be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mossquant.checkpoint.checks import plan_offenders, structure_offenders, value_offenders
from mossquant.checkpoint.manifest import Manifest, file_offenders, read_manifest
from mossquant.checkpoint.packing import quantization_config, stored_names, unpack
from mossquant.checkpoint.tensorfiles import TensorFiles
from mossquant.errors import InputError
from mossquant.files.inputs import is_there
from mossquant.files.json import LARGEST, read_json
from mossquant.formats import NumberFormat, QuantizedTensor, get_format
from mossquant.model.config import MossNetConfig, read_config_json
from mossquant.model.mossnet import tensor_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.plan import Plan

__all__ = ["QuantizedCheckpoint"]


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized model, memory-mapped.

    Attributes:
        folder: where it lies.
        config: the model's shape.
        torch_dtype: stored type of the checkpoint that it was made from ("bfloat16").
        specs: tensor name → what it is, in processing order.
        plan: the ledger.
        manifest: files, hashes and parent.
    """

    folder: Path
    config: MossNetConfig
    torch_dtype: str
    specs: Mapping[str, TensorSpec]
    plan: Plan
    manifest: Manifest
    _files: TensorFiles

    @classmethod
    def open(cls, folder: Path, *, check_hashes: bool = True) -> "QuantizedCheckpoint":
        """Open a quantized checkpoint and check it.

        Args:
            folder: its folder.
            check_hashes: compare the SHA-256 of every file with the manifest, and look at every code and value; without
                it, only sizes, names, shapes and types are compared.

        Raises:
            InputError: a full-precision checkpoint, unreadable or changed files, tensors that do not fit config or
                ledger, codes out of range, scales that are not positive and finite: all offenders at once.
        """
        values = read_config_json(folder)
        if "quantization_config" not in values:
            raise InputError(f"{folder} is not quantized; quantize it first with `mossquant quantize`")
        again = "Copy the folder again, or quantize again."
        manifest = read_manifest(folder)
        offenders = file_offenders(folder, manifest, check_hashes=check_hashes)
        if offenders:
            raise InputError.listing(f"{folder} is damaged", offenders, again)
        config = MossNetConfig.from_json(values, where=str(folder / "config.json"))
        ledger = folder / "ledger.json"
        stored = read_json(ledger, largest=LARGEST, advice="copy the folder again, or quantize again")
        plan = Plan.from_json(stored, where=str(ledger))
        specs = {spec.name: spec for spec in tensor_specs(config)}
        files = TensorFiles(folder)
        torch_dtype = values.get("torch_dtype", "float32")
        offenders = plan_offenders(config, specs, plan)
        if not offenders:
            offenders = structure_offenders(plan, files)
            offenders += [f"manifest.json does not list {name}" for name in files.files if name not in manifest.files]
            parent = manifest.parent
            said = (manifest.recipe, manifest.payload_bytes, parent.torch_dtype, parent.bytes)
            if said != (plan.recipe, plan.predicted_bytes, torch_dtype, plan.stored_bytes):
                offenders.append("manifest.json has another recipe, size or type than ledger.json and config.json")
            if values["quantization_config"] != quantization_config(specs, plan):
                offenders.append("quantization_config of config.json does not say what ledger.json says")
        if not offenders and check_hashes:
            offenders = [what for entry in plan.tensors for what in value_offenders(entry, files)]
        if offenders:
            raise InputError.listing(f"{folder} contradicts itself", offenders, again)
        return cls(folder, config, torch_dtype, specs, plan, manifest, files)

    @property
    def recipe_name(self) -> str:
        """Name of the recipe that made it."""
        return self.plan.recipe

    @property
    def parameters(self) -> int:
        """Parameters of the full-precision model, a tied table once."""
        return self.plan.parameters

    @property
    def payload_bytes(self) -> int:
        """Bytes of codes, padding, scales and kept tensors."""
        return self.plan.predicted_bytes

    @property
    def bits_per_weight(self) -> float:
        """8 · payload bytes / parameters."""
        return self.plan.bits_per_weight

    @property
    def file_bytes(self) -> int:
        """Bytes on disk of the tensor files (the index of shards included)."""
        return sum(self.manifest.files[name].bytes for name in self._files.files)

    @property
    def tokenizer_path(self) -> Path | None:
        """The `tokenizer.json`, if there is one."""
        path = self.folder / "tokenizer.json"
        return path if is_there(path) else None

    @property
    def parent(self) -> dict[str, Any]:
        """What it was made from: torch_dtype, parameters, bytes, and files with their SHA-256."""
        return self.manifest.parent.model_dump()

    def hashes(self) -> dict[str, str]:
        """File name → SHA-256, as the manifest records it."""
        return {name: record.sha256 for name, record in self.manifest.files.items()}

    def seen_text(self) -> tuple[str, ...]:
        """SHA-256 of the texts that the model was trained or calibrated on."""
        return (*self.manifest.text.training, *self.manifest.text.calibration)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored as codes."""
        return self.plan.by_name[name].format is not None

    def packed(self, name: str) -> Tensor:
        """Codes of a quantized tensor as stored (`….packing`): int32 [rows, padded_columns · bits / 32]."""
        return self._files.tensor(stored_names(name)[0])

    def quantized(self, name: str) -> QuantizedTensor:
        """A quantized tensor in its matrix view."""
        entry = self.plan.by_name[name]
        if entry.format is None:
            raise ValueError(f"{name} is kept in {entry.kept}; use kept(name)")
        found = get_format(entry.format)
        codes = unpack(self.packed(name), found.bits)
        return QuantizedTensor(found, codes, self._files.tensor(stored_names(name)[1]), entry.rows, entry.columns)

    def kept(self, name: str) -> Tensor:
        """A tensor that was kept, in the type in which it is kept and the checkpoint's shape."""
        entry = self.plan.by_name[name]
        if entry.kept is None:
            raise ValueError(f"{name} is quantized to {entry.format}; use quantized(name)")
        return self._files.tensor(name)

    def value(self, name: str) -> Tensor:
        """The fp32 values of a tensor in the checkpoint's shape: what its codes mean, or what was kept."""
        if self.is_quantized(name):
            return self.specs[name].from_matrix(self.quantized(name).dequantize())
        return self.kept(name).float()

    def activation_format(self, site: str) -> tuple[str, int | None]:
        """(format, block) of a site, e.g. of "layers.0.mixer.in_proj.input"; block None where the format has none."""
        entry = next(entry for entry in self.plan.activations if entry.name == site)
        return entry.format, entry.block

    def weight_format(self, tensor: str) -> NumberFormat | None:
        """The number format of a tensor; None where it is kept."""
        return self.plan.weight_format(tensor)

    def input_format(self, tensor: str) -> tuple[str, int] | None:
        """(activation format, block) of the input of a linear, by its weight's name; None where the weight is kept."""
        return self.plan.input_format(tensor)
