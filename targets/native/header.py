# SPDX-License-Identifier: Apache-2.0
"""The header of a .moss: that of a safetensors file, padded so that the data behind it begins at a multiple of 64.

8 bytes, little-endian: n;  n bytes of JSON, spaces at its end;  the tensors, one after the other, without holes
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mossquant.errors import InputError
from mossquant.files.json import LARGEST, parse_json
from mossquant.targets.native.stored import ALIGNMENT

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_TYPE = "U8"
_AGAIN = "copy the artifact's folder again, or export again"


def header_bytes(metadata: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
    """The header of a file.

    Args:
        metadata: what it says about itself.
        sizes: tensor name → bytes, in the order in which the tensors follow.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    begin = 0
    for name, size in sizes.items():
        entries[name] = {"dtype": _TYPE, "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> tuple[dict[str, str], dict[str, slice]]:
    """What a file says about itself, and where each tensor lies in it.

    Raises:
        InputError: it is no safetensors file of bytes, cut short, has a header above 16 MB, or its tensors do not fill
            it one after the other from a multiple of 64 on.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        begin = _LENGTH_BYTES + length
        if length > LARGEST or begin > size:
            raise _unreadable(path, "its header does not end")
        text = file.read(length)
    try:
        entries = parse_json(text.decode())
    except ValueError as error:  # of which UnicodeDecodeError is one
        raise _unreadable(path, str(error)[:120]) from None
    metadata = entries.pop(_METADATA, {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _unreadable(path, "its header says nothing about it")
    spans = {name: _span(path, name, entry) for name, entry in entries.items()}
    if begin % ALIGNMENT != 0:
        raise _unreadable(path, f"its tensors do not begin at a multiple of {ALIGNMENT}")
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)):
        if span.start != end:
            raise _unreadable(path, f"{name[:80]} does not follow the tensor before it")
        end = span.stop
    if begin + end != size:
        raise _unreadable(path, f"it has {size:,} bytes, and its tensors end at {begin + end:,}")
    return metadata, {name: slice(begin + span.start, begin + span.stop) for name, span in spans.items()}


def _span(path: Path, name: str, entry: Any) -> slice:
    match entry:
        case {"dtype": "U8", "shape": [int(size)], "data_offsets": [int(start), int(stop)]}:
            if start >= 0 and size > 0 and start + size == stop:
                return slice(start, stop)
    raise _unreadable(path, f"{name[:80]} is no row of bytes")


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a readable .moss (cut short, damaged or of another format: {reason}); {_AGAIN}")
