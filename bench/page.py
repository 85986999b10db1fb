# SPDX-License-Identifier: Apache-2.0
"""Pages in Markdown whose sections are written one by one, by different runs."""

import re


def parted(text: str, mark: str = "## ") -> tuple[str, dict[str, str]]:
    """What stands before the first heading of a level, and its sections by heading, each without the mark."""
    before, *parts = re.split(f"^{re.escape(mark)}", text, flags=re.MULTILINE)
    return before.rstrip(), {part.partition("\n")[0]: part.rstrip() for part in parts}


def joined(before: str, sections: dict[str, str], mark: str = "## ") -> str:
    """The page of what `parted` gives."""
    return "\n\n".join([before, *(f"{mark}{part}" for part in sections.values())]).lstrip() + "\n"

