# SPDX-License-Identifier: Apache-2.0
"""The demo's table as a picture, an SVG that needs no font from the network. The same report gives the same bytes."""

import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from mossquant.eval.report.demo_report import DemoReport, demo_table
from mossquant.files.outputs import new_file

_WIDTH = 80
"""Characters a line: the table without a break."""

_THEME = TerminalTheme((255, 255, 255), (31, 35, 40), [(31, 35, 40)] * 8)
_SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
<rect fill="#ffffff" x="0" y="0" width="{width}" height="{height}" rx="8" />
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def write_picture(report: DemoReport, path: Path) -> None:
    """Write the table to `path`; a picture of an earlier run is replaced."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), highlight=False)
    console.print(demo_table(report))
    with new_file(path, force=True) as partial:
        partial.write_text(
            console.export_svg(title="", theme=_THEME, code_format=_SVG, unique_id="mossquant"), encoding="utf-8"
        )
