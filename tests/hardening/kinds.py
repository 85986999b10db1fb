# SPDX-License-Identifier: Apache-2.0
"""Every kind of file that is damaged: where it lies among the samples, how, and what is done with its folder then.

Another target adds its lines here: a program file with its mutator, and its manifest.
"""

from dataclasses import dataclass

from hardening.case import Mutator
from hardening.flatbuffer_files import mutate_flatbuffer
from hardening.json_files import mutate_json
from hardening.onnx_files import mutate_onnx
from hardening.raw import mutate_bytes
from hardening.safetensors_files import mutate_moss, mutate_safetensors
from hardening.tokenizer_files import mutate_tokenizer
from hardening.yaml_files import mutate_yaml
from hardening.zip_files import mutate_zip


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        folder: the sample that holds it.
        file: its name there.
        mutate: how it is damaged.
        actions: a key of `hardening.actions.ACTIONS`.
        weight: how often it is drawn, beside the others.
    """

    folder: str
    file: str
    mutate: Mutator
    actions: str
    weight: int = 1

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}"


KINDS = (
    Kind("checkpoint", "config.json", mutate_json, "checkpoint"),
    Kind("checkpoint", "model.safetensors", mutate_safetensors, "checkpoint", weight=2),
    Kind("checkpoint", "tokenizer.json", mutate_tokenizer, "checkpoint", weight=3),
    Kind("checkpoint", "text.json", mutate_json, "checkpoint"),
    Kind("checkpoint", "training.json", mutate_json, "checkpoint"),
    Kind("sharded", "model.safetensors.index.json", mutate_json, "checkpoint"),
    Kind("sharded", "model-00002.safetensors", mutate_safetensors, "checkpoint"),
    Kind("quantized", "config.json", mutate_json, "quantized"),
    Kind("quantized", "model.safetensors", mutate_safetensors, "quantized", weight=2),
    Kind("quantized", "ledger.json", mutate_json, "quantized", weight=2),
    Kind("quantized", "manifest.json", mutate_json, "quantized"),
    Kind("quantized", "tokenizer.json", mutate_tokenizer, "quantized"),
    Kind("quantized", "recipe.yaml", mutate_yaml, "quantized"),
    Kind("quantized-shards", "model.safetensors.index.json", mutate_json, "quantized"),
    Kind("artifact", "model.onnx", mutate_onnx, "program", weight=5),
    Kind("artifact", "manifest.json", mutate_json, "program"),
    Kind("artifact", "tokenizer.json", mutate_tokenizer, "program"),
    Kind("artifact", "text.json", mutate_json, "program"),
    Kind("external", "model.onnx", mutate_onnx, "program", weight=2),
    Kind("external", "model.onnx.data", mutate_bytes, "program"),
    Kind("artifact-pte", "model.pte", mutate_flatbuffer, "stream", weight=6),
    Kind("artifact-pte-own", "model.pte", mutate_flatbuffer, "stream", weight=4),
    Kind("artifact-pte", "manifest.json", mutate_json, "stream"),
    Kind("artifact-pte", "tokenizer.json", mutate_tokenizer, "stream"),
    Kind("artifact-native", "model.moss", mutate_moss, "program", weight=4),
    Kind("artifact-native", "manifest.json", mutate_json, "program"),
    Kind("mamba", "config.json", mutate_json, "source"),
    Kind("mamba", "model.safetensors", mutate_safetensors, "source"),
    Kind("original", "config.json", mutate_json, "source"),
    Kind("original", "pytorch_model.bin", mutate_zip, "source"),
    Kind("recipe", "recipe.yaml", mutate_yaml, "recipe", weight=2),
    Kind("statistics", "manifest.json", mutate_json, "statistics"),
    Kind("statistics", "statistics.safetensors", mutate_safetensors, "statistics"),
)
