# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint on disk: packed tensors, what was asked, what happened, and what it was made from.

    config.json         the model's config, with compressed-tensors' `quantization_config`
    model.safetensors   codes, scales, padded shapes (`….packing`), and tensors that are kept; or shards
    recipe.yaml         what was asked, as written
    ledger.json         what happened to each tensor (`mossquant.plan.plan`), with true and padded shapes
    manifest.json       sha256 and size of each file, versions, the parent's hashes, texts that the model has seen
    tokenizer.json, text.json, training.json    copied from the checkpoint, where there are any

Opening checks all of it but the codes, which `check_codes` reads: nothing is believed that can be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mossquant.checkpoint.checks import code_offenders, plan_offenders, structure_offenders, value_offenders
from mossquant.checkpoint.manifest import Manifest, file_offenders, read_manifest
from mossquant.checkpoint.packing import quantization_config, read_quantized, stored_names
from mossquant.checkpoint.tensorfiles import TensorFiles
from mossquant.checkpoint.weights import BESIDE, Origin
from mossquant.errors import InputError
from mossquant.files.json import LARGEST, read_json
from mossquant.formats import NumberFormat, QuantizedTensor
from mossquant.model.config import MossNetConfig, read_config_json
from mossquant.model.mossnet import tensor_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.plan import Plan
from mossquant.text.declared import TEXT_FILE

_AGAIN = "Copy the folder again, or quantize again."


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized model, memory-mapped: `mossquant.checkpoint.weights.Weights` by its ledger.

    Attributes:
        folder: where it lies.
        config: the model's shape.
        torch_dtype: stored type of the checkpoint that it was made from ("bfloat16").
        specs: tensor name → what it is, in processing order.
        plan: the ledger.
        manifest: files, hashes and parent.
        path: the folder as the user named it.
    """

    folder: Path
    config: MossNetConfig
    torch_dtype: str
    specs: Mapping[str, TensorSpec]
    plan: Plan
    manifest: Manifest
    path: str
    _files: TensorFiles

    @classmethod
    def open(cls, folder: Path, *, path: str | None = None) -> "QuantizedCheckpoint":
        """Open a quantized checkpoint and check it.

        Args:
            folder: its folder.
            path: how the user named it, the folder if not given.

        Raises:
            InputError: a full-precision checkpoint, unreadable or changed files, tensors that do not fit config or
                ledger, scales that are not positive and finite: all offenders at once.
        """
        values = read_config_json(folder)
        if "quantization_config" not in values:
            raise InputError(f"{folder} is not quantized; quantize it first with `mossquant quantize`")
        manifest = read_manifest(folder)
        offenders = file_offenders(folder, manifest)
        if offenders:
            raise InputError.listing(f"{folder} is damaged", offenders, _AGAIN)
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
        if not offenders:
            offenders = [offender for entry in plan.tensors for offender in value_offenders(entry, files)]
        if offenders:
            raise InputError.listing(f"{folder} contradicts itself", offenders, _AGAIN)
        return cls(folder, config, torch_dtype, specs, plan, manifest, path or str(folder), files)

    def check_codes(self) -> None:
        """Look at every code. Raises `InputError`: one is out of range, or other than 0 in the padding."""
        offenders = [offender for entry in self.plan.tensors for offender in code_offenders(entry, self._files)]
        if offenders:
            raise InputError.listing(f"{self.folder} contradicts itself", offenders, _AGAIN)

    @cached_property
    def origin(self) -> Origin:
        """What it is and was made from, as ledger and manifest record it."""
        manifest, files = self.manifest, self.manifest.files
        beside = (self.folder / name for name in BESIDE if name in files)
        return Origin(
            path=self.path,
            kind="quantized checkpoint",
            recipe=self.plan.recipe,
            torch_dtype=self.torch_dtype,
            parameters=self.plan.parameters,
            payload_bytes=self.plan.predicted_bytes,
            file_bytes=sum(files[name].bytes for name in self._files.files),
            files={name: record.sha256 for name, record in files.items() if name != TEXT_FILE},
            training_text=tuple(manifest.text.training),
            calibration_text=tuple(manifest.text.calibration),
            beside=tuple(beside),
        )

    def packed(self, name: str) -> Tensor:
        """Codes of a quantized tensor as stored (`….packing`): int32 [rows, padded_columns · bits / 32]."""
        return self._files.tensor(stored_names(name)[0])

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor; None where it is kept."""
        return self.plan.weight_format(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """A quantized tensor in its matrix view."""
        entry, number_format = self.plan.by_name[name], self.format(name)
        if number_format is None:
            raise ValueError(f"{name} is kept in {entry.kept}; use kept(name)")
        return read_quantized(name, number_format, entry.rows, entry.columns, self._files.tensor)

    def kept(self, name: str) -> Tensor:
        """A tensor that was kept, in the type in which it is kept and the checkpoint's shape."""
        entry = self.plan.by_name[name]
        if entry.kept is None:
            raise ValueError(f"{name} is quantized to {entry.format}; use quantized(name)")
        return self._files.tensor(name)

    def activation(self, site: str) -> str:
        """The planned activation format of a site."""
        return self.plan.site(site).format

    def state(self, name: str) -> str:
        """The planned format of a state array."""
        return next(entry.format for entry in self.plan.state if entry.name == name)
