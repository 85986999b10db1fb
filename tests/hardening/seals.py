# SPDX-License-Identifier: Apache-2.0
"""Makes every hash and length of a damaged folder right again, so that what lies behind them is reached.

Lengths inside a file (of a safetensors header, of protobuf messages) are right already where the damage was done to
the structure. What cannot be read any more is left as it is.
"""

import json
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from mossquant.files.outputs import file_sha256


def reseal(folder: Path) -> None:
    """Hashes and sizes in an .onnx of the files beside it, then in `manifest.json` of every file."""
    for program in sorted(folder.glob("*.onnx")):
        _reseal_program(program)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    try:
        values = json.loads(manifest.read_bytes())
        listed = values["files"].items()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    for name, record in listed:
        if isinstance(record, dict) and _beside(folder, name):
            record |= {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
    manifest.write_text(json.dumps(values))


def _reseal_program(program: Path) -> None:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(program.read_bytes())
        prop = next(prop for prop in model.metadata_props if prop.key == "mossquant")
        values: Any = json.loads(prop.value)
        data, folder = values["data"], program.parent
        if isinstance(data, dict) and _beside(folder, data["name"]):
            path = folder / data["name"]
            data |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        if isinstance(values["tokenizer_sha256"], str) and (folder / "tokenizer.json").is_file():
            values["tokenizer_sha256"] = file_sha256(folder / "tokenizer.json")
        if isinstance(values.get("text"), dict) and (folder / "text.json").is_file():
            values["text"] = json.loads((folder / "text.json").read_bytes())
    except (DecodeError, StopIteration, ValueError, LookupError, TypeError, RecursionError):
        return
    if json.dumps(values) != json.dumps(json.loads(prop.value)):
        prop.value = json.dumps(values)
        program.write_bytes(model.SerializeToString())


def _beside(folder: Path, name: Any) -> bool:
    short = isinstance(name, str) and len(name) < 200 and not set("/\0") & set(name)
    return short and (folder / name).is_file()
