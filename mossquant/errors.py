# SPDX-License-Identifier: Apache-2.0
"""What a user did wrong, in one line: what was found, where, and what to do about it.

Everything else that is raised is a bug of ours. The command line turns `InputError` into exit status 2 and any
other exception into 70, so raise `InputError` only where the input is at fault.
"""

from collections.abc import Iterable, Sequence

LISTED = 8
"""How many offenders a message prints."""
_LONGEST, _END = 2000, 300


class InputError(ValueError):
    """Bad input or usage. The message is one line and tells the user what to do.

    Names out of files (a tensor's, a key's) end up in it: characters that would break the line, or tell the terminal
    something, are shown escaped. A message that a file made very long keeps its beginning and its advice.
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - _END]} … {text[-_END:]}")

    @classmethod
    def listing(cls, what: str, offenders: Sequence[str], advice: str) -> "InputError":
        """All offenders at once: ``what: first; second; … and 12 more. advice``.

        Args:
            what: what is wrong, with where (a file or folder), without a full stop.
            offenders: one short phrase each; the first eight are printed, the rest are counted.
            advice: what to do, one sentence.
        """
        shown = "; ".join(offenders[:LISTED])
        rest = len(offenders) - LISTED
        more = f"; and {rest} more" if rest > 0 else ""
        return cls(f"{what}: {shown}{more}. {advice}")

    @classmethod
    def unknown(cls, what: str, name: str, known: Iterable[str]) -> "InputError":
        """A name that is none of the known ones: ``unknown number format 'int3'; known formats: int8, …``."""
        return cls(f"unknown {what} {name[:40]!r}; known {what.split()[-1]}s: {', '.join(known)}")


def printable(text: str, *, keep: str = "") -> str:
    """`text` with every character escaped that would break a line or tell a terminal something, but those of `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
