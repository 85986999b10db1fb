# SPDX-License-Identifier: Apache-2.0
"""Damage that knows nothing of the file: flipped bits, overwritten, missing, doubled and foreign bytes, truncation."""

from random import Random

from hardening.case import Damage

_FOREIGN = (
    b"",
    b"\x00",
    b"\x80\x04.",
    b"PK\x03\x04",
    b"[" * 100_000,
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"null",
    b"hello, world\n",
    bytes(4096),
)


def mutate_bytes(random: Random, data: bytes) -> Damage:
    """One to four pieces of damage, or another content."""
    if not data or random.random() < 0.05:
        foreign = random.choice(_FOREIGN)
        return Damage(foreign, f"content replaced by {foreign[:12]!r}")
    changed, said = bytearray(data), []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at, length = random.randrange(len(changed) or 1), random.choice((1, 1, 2, 4, 8, 64))
        kind = random.choice(("flip", "flip", "overwrite", "clear", "fill", "cut", "insert", "double", "truncate"))
        if kind == "flip" and changed:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == "truncate":
            del changed[at:]
        else:
            new = {
                "overwrite": random.randbytes(length),
                "clear": bytes(length),
                "fill": b"\xff" * length,
                "insert": changed[at : at + 1] + random.randbytes(length),
                "double": changed[at : at + length] * 2,
            }.get(kind, b"")
            changed[at : at + (1 if kind == "insert" else length)] = new
        said.append(f"{kind} {length} at {at}")
    return Damage(bytes(changed), ", ".join(said))
