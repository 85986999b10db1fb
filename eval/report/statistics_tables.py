# SPDX-License-Identifier: Apache-2.0
"""Statistics of calibration as tables: how much of the text reached what."""

from rich.table import Table

from mossquant.calibration.statistics import InputRecord, Manifest
from mossquant.eval.report.grid import DASH, grid, left, right, spaced
from mossquant.targets.info_report import short_hashes


def statistics_info(path: str, manifest: Manifest) -> list[Table | str]:
    """What a folder of statistics is, then its tables."""
    alone = sum(record.expert is not None for record in manifest.inputs)
    size = sum(file.bytes for file in manifest.files.values())
    facts = [
        ("what", f"{path} ({manifest.kind})"),
        ("of the model", short_hashes(manifest.parent)),
        *(("text", f"SHA-256 {digest}") for digest in manifest.text),
        ("tokens", f"{manifest.tokens:,}"),
        ("inputs of linears", f"{len(manifest.inputs)}, of which {alone} of one expert each"),
        ("wanted", f"{manifest.quota:g} effective tokens times the width"),
        ("lacking text", str(len(manifest.shortfalls)) if manifest.shortfalls else DASH),
        ("second moments", f"{size:,} bytes: {short_hashes({name: of.sha256 for name, of in manifest.files.items()})}"),
        ("written by", f"mossquant {manifest.release}"),
    ]
    return [grid(left("", ""), facts, header=False), "", *statistics_tables(manifest)]


def statistics_tables(manifest: Manifest) -> list[Table | str]:
    """By input of a layer: its experts, and the fewest and most effective tokens; then what lacks text."""
    sites: dict[str, list[InputRecord]] = {}
    for record in manifest.inputs:
        sites.setdefault(record.name.partition(".experts.")[0], []).append(record)
    rows = []
    for site, records in sites.items():
        effective = sorted(record.effective for record in records)
        lack = sum(record.lacks for record in records)
        rows.append(
            (
                site,
                DASH if records[0].expert is None else str(len(records)),
                str(records[0].width),
                f"{records[0].needed:,.0f}",
                f"{effective[0]:,.0f}",
                f"{effective[-1]:,.0f}",
                str(lack) if lack else DASH,
            )
        )
    lacking = [
        (record.name, f"{record.tokens:,}", f"{record.effective:,.0f}", f"{record.needed:,.0f}")
        for record in manifest.shortfalls
    ]
    caption = (
        f"{manifest.tokens:,} tokens of {len(manifest.text)} text{'s' * (len(manifest.text) != 1)}, "
        f"in windows of {manifest.window}; one of eight is held out. Effective tokens: (Σ g²)² / Σ g⁴ of the gates."
    )
    heads = [*left("input"), *right("experts", "width", "wanted", "fewest", "most", "lacking")]
    tables = [grid(heads, rows, caption=caption, whole_names=True)]
    if lacking:
        tables.append(grid([*left("lacks text"), *right("tokens", "effective", "wanted")], lacking, whole_names=True))
    return spaced(*tables)
