# SPDX-License-Identifier: Apache-2.0
"""mossquant compresses MossNet and Mamba language models for phones, and measures what ships.

The public functions, one for each verb of the command line. They are loaded when first used, so that importing
`mossquant` stays quick and a target's runtime is needed only by who uses that target.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mossquant.calibration.quantize import quantize
    from mossquant.eval.bench import bench
    from mossquant.eval.compare import compare
    from mossquant.eval.generate import generate
    from mossquant.eval.info import info
    from mossquant.eval.open import open_runner
    from mossquant.eval.perplexity import perplexity
    from mossquant.eval.report.demo import demo
    from mossquant.eval.verify import verify
    from mossquant.importing.mamba import import_mamba
    from mossquant.state_file import load_state, save_state
    from mossquant.targets.export import export, export_needs
    from mossquant.training.train import train

__all__ = [
    "bench",
    "compare",
    "demo",
    "export",
    "export_needs",
    "generate",
    "import_mamba",
    "info",
    "load_state",
    "open_runner",
    "perplexity",
    "quantize",
    "save_state",
    "train",
    "verify",
]

_WHERE = {
    "bench": "mossquant.eval.bench",
    "compare": "mossquant.eval.compare",
    "demo": "mossquant.eval.report.demo",
    "export": "mossquant.targets.export",
    "export_needs": "mossquant.targets.export",
    "generate": "mossquant.eval.generate",
    "import_mamba": "mossquant.importing.mamba",
    "info": "mossquant.eval.info",
    "load_state": "mossquant.state_file",
    "open_runner": "mossquant.eval.open",
    "perplexity": "mossquant.eval.perplexity",
    "quantize": "mossquant.calibration.quantize",
    "save_state": "mossquant.state_file",
    "train": "mossquant.training.train",
    "verify": "mossquant.eval.verify",
}


if find_spec("mossquant.eval") is None:
    raise ImportError(
        "this is the folder of mossquant's source, not the installed package; run Python in another folder, or with -P"
    )


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mossquant' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
