# SPDX-License-Identifier: Apache-2.0
"""Runs cases one after the other in this process; a seed alone, or FIRST:END.

    PYTHONSAFEPATH=1 PYTHONPATH=tests python -m hardening 0:2400

Prints every case that fails, and at the end counts by kind of file. What is under way is written to `--log` before it
begins, so that a native crash names its case too.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from hardening.cases import make_case, run_case
from hardening.guard import cap_memory
from hardening.samples import make_samples


def main() -> int:
    """Run; the exit status is 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m hardening", description=__doc__)
    parser.add_argument("seeds", nargs="+", help="a seed, or FIRST:END")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="a line of JSON before and after each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    failed, slowest, largest = 0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as above, options.log.open("w", buffering=1) as log:
        samples, work = Path(above) / "samples", Path(above) / "work"
        samples.mkdir()
        work.mkdir()
        make_samples(samples)
        cap_memory()
        for seed in (seed for text in options.seeds for seed in _seeds(text)):
            case = make_case(seed, samples)
            print(json.dumps({"begins": case.name}), file=log)
            outcome = run_case(case, samples, work)
            print(json.dumps({"ended": case.name, **asdict(outcome)}), file=log)
            if outcome.problem is not None:
                failed += 1
                print(f"FAILED {case.name}\n{outcome.problem}\n", flush=True)
            counts[case.kind.name, outcome.verdict if outcome.problem is None else "failed"] += 1
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.extra_mb)
    for name in dict.fromkeys(name for name, _ in sorted(counts)):
        print(f"{name:48}" + "".join(f"{counts[name, v]:6} {v}" for v in ("refused", "accepted", "failed")))
    print(f"{counts.total()} cases, {failed} failed; longest {slowest:.1f} s, most memory {largest:.0f} MB above")
    return 1 if failed else 0


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end) if end else int(first) + 1)


if __name__ == "__main__":
    sys.exit(main())
