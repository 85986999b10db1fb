# SPDX-License-Identifier: Apache-2.0
"""Damage to safetensors and .moss: entries of the header, sizes and offsets that lie, values that are no numbers."""

import json
import struct
from random import Random
from typing import Any

from hardening.case import Damage, one_of
from hardening.json_files import mutate_json_text
from hardening.raw import mutate_bytes
from hardening.values import as_json

_SIZES = (0, -1, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**18, 10**30)
_LENGTHS = (0, 1, 2, 8, 2**20, 10**8, 2**31, 2**63, 2**64 - 1)
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "U16", "C64", "F4", "", "float")
_NOT_NUMBERS = (b"\xff\xff", b"\x80\x7f", b"\x80\xff", b"\x7f\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f")


def _parts(data: bytes) -> tuple[str, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode(), data[8 + length :]


def _whole(header: str, body: bytes) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    encoded += b" " * (-(8 + len(encoded)) % 64)  # as in a .moss, whose data begin at a multiple of 64
    return struct.pack("<Q", len(encoded)) + encoded + body


def _header(random: Random, data: bytes) -> Damage:
    header, body = _parts(data)
    text, what = mutate_json_text(random, header)
    return Damage(_whole(text, body), f"header: {what}")


def _entry(random: Random, data: bytes) -> Damage:
    """Shape, offsets, type or name of one tensor."""
    header, body = _parts(data)
    tree: dict[str, Any] = json.loads(header)
    names = [name for name in tree if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = tree[name]
    start, end = entry["data_offsets"]
    kind = random.choice(("shape", "shape", "overlap", "offsets", "dtype", "empty", "exchange", "twice", "more"))
    if kind == "shape":
        at = random.randrange(len(entry["shape"]) + 1)
        entry["shape"] = [*entry["shape"][:at], random.choice(_SIZES), *entry["shape"][at + random.choice((0, 1)) :]]
    elif kind == "overlap":
        entry["data_offsets"] = tree[other]["data_offsets"]
    elif kind == "offsets":
        beyond = ([start, 2**63], [2**64 - 1, 1], [start, 10**30])
        entry["data_offsets"] = random.choice(([end, start], [-1, end], [start, -1], *beyond, [start + 1, end + 1]))
    elif kind == "dtype":
        entry["dtype"] = random.choice(_DTYPES)
    elif kind == "empty":
        tree[random.choice(("empty", name + ".x"))] = {
            "dtype": "F32",
            "shape": random.choice(([0, 10**18], [0], [10**18, 0, 10**18])),
            "data_offsets": [0, 0],
        }
    elif kind == "exchange":
        tree[name], tree[other] = tree[other], tree[name]
    elif kind == "twice":
        return Damage(
            _whole(header.rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(tree[other])}}}", body), f"{name} twice"
        )
    else:
        empty = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
        many = ",".join(f'"t{i}":{empty}' for i in range(random.choice((1000, 300_000))))
        return Damage(_whole(f"{{{many},{header.lstrip()[1:]}", body), "very many empty tensors")
    return Damage(_whole(as_json(tree), body), f"{kind} of {name}: {entry}"[:150])


def _length(random: Random, data: bytes) -> Damage:
    length = random.choice((*_LENGTHS, len(data), len(data) - 8, random.randrange(len(data))))
    return Damage(struct.pack("<Q", length) + data[8:], f"header length {length}")


def _values(random: Random, data: bytes) -> Damage:
    """NaN, infinities and largest numbers, whole tensors of 0xFF or zeros, a body that is cut short."""
    header, body = _parts(data)
    tree = json.loads(header)
    name = random.choice([name for name in tree if name != "__metadata__"])
    start, end = tree[name]["data_offsets"]
    changed = bytearray(body)
    kind = random.choice(("one", "one", "all", "zeros", "noise", "short"))
    new = random.choice(_NOT_NUMBERS)
    if kind == "one":
        at = start + random.randrange(max(1, (end - start) // len(new))) * len(new)
        changed[at : at + len(new)] = new
    elif kind == "all":
        changed[start:end] = (new * (end - start))[: end - start]
    elif kind == "zeros":
        changed[start:end] = bytes(end - start)
    elif kind == "noise":
        changed[start:end] = random.randbytes(end - start)
    else:
        del changed[random.randrange(len(changed)) :]
    return Damage(_whole(header, bytes(changed)), f"{kind} of {name}: {new.hex()}")


def _said(random: Random, data: bytes) -> Damage:
    """JSON inside the texts of `__metadata__`."""
    header, body = _parts(data)
    tree = json.loads(header)
    key = random.choice(list(tree["__metadata__"]))
    tree["__metadata__"][key], what = mutate_json_text(random, tree["__metadata__"][key])
    return Damage(_whole(as_json(tree), body), f"{key}: {what}")


mutate_safetensors = one_of((3, _header), (6, _entry), (1, _length), (5, _values), (3, mutate_bytes))
mutate_moss = one_of((3, mutate_safetensors), (1, _said))
