# SPDX-License-Identifier: Apache-2.0
"""Damage to what torch.save wrote, a zip with a pickle inside: the pickle's bytes, entries, sizes, a bomb."""

import io
import zipfile
from random import Random

from hardening.case import Damage, one_of
from hardening.raw import mutate_bytes


def _entries(random: Random, data: bytes) -> Damage:
    """The zip written again, every checksum right, with one entry changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    if random.random() < 0.3:
        name = random.choice(list(entries))
    kind = random.choice(("bytes", "bytes", "bytes", "delete", "rename", "bomb", "short"))
    deflated = zipfile.ZIP_STORED
    if kind == "bytes":
        damage = mutate_bytes(random, entries[name])
        entries[name], what = damage.data, damage.what
    elif kind == "delete":
        del entries[name]
        what = "gone"
    elif kind == "rename":
        entries[f"{name}.x"] = entries.pop(name)
        what = "renamed"
    elif kind == "short":
        entries[name] = entries[name][: len(entries[name]) // 2]
        what = "half of it"
    else:
        entries[name], what, deflated = bytes(1 << 26), "67 MB of zeros in 65 kB", zipfile.ZIP_DEFLATED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", deflated) as target:
        for entry, content in entries.items():
            target.writestr(zipfile.ZipInfo(entry), content, deflated)  # without the time of day
    return Damage(buffer.getvalue(), f"{name}: {what}")


mutate_zip = one_of((3, _entries), (2, mutate_bytes))
