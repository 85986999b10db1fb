# SPDX-License-Identifier: Apache-2.0
"""Lowering for the demo: several models side by side, since PyTorch's export of one keeps one core busy."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mossquant.eval.verify import verify
from mossquant.progress import Progress
from mossquant.targets.child import Child, serve
from mossquant.targets.export import export


class Lowering(NamedTuple):
    """What is to be lowered: PATH of a model, folder of the artifact, targets."""

    source: str
    output: str
    targets: tuple[str, ...]


def lower(work: Lowering, progress: Progress | None = None) -> None:
    """Export a model, over what is there, and read its weights back.

    Raises:
        RuntimeError: the artifact does not hold the model's weights.
    """
    output = Path(work.output)
    artifact = export(work.source, output, target=work.targets, force=output.exists(), progress=progress)
    report = verify(work.source, [artifact.program(target) for target in work.targets], weights_only=True)
    if not report.passed:
        # Its hashes match and we wrote it: a fault of the lowering, not of the user.
        raise RuntimeError(f"{output} does not hold its checkpoint's weights: {report.failures()[0]}")


def lower_all(works: list[Lowering], progress: Progress | None = None) -> None:
    """Lower models, the last of several in a process of its own beside the others; errors as `lower`."""
    if len(works) < 2:
        for work in works:
            lower(work, progress)
        return
    *here, apart = works
    child = Child(__name__, quiet=True)
    with ThreadPoolExecutor(1) as pool:
        try:
            answer = pool.submit(child.ask, apart._asdict())
            for work in here:
                lower(work, progress)
            if answer.result() is None:
                raise RuntimeError(f"lowering {apart.source} failed; mossquant export {apart.source} says why")
        finally:
            child.close()  # also where something else failed: nobody waits for it


def _answer(order: Mapping[str, Any]) -> dict[str, Any]:
    lower(Lowering(order["source"], order["output"], tuple(order["targets"])))
    return {}


if __name__ == "__main__":
    serve(_answer)
