# SPDX-License-Identifier: Apache-2.0
"""mossquant compresses MossNet and Mamba language models for phones, and measures what ships.

The public functions, one for each verb of the command line, and what their arguments are made of. They are loaded when
first used, so that importing `mossquant` stays quick and a target's runtime is needed only by who uses that target.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mossquant.calibration.calibrate import calibrate as calibrate
    from mossquant.calibration.prune import prune as prune
    from mossquant.calibration.quantize import quantize as quantize
    from mossquant.calibration.sensitivity import sensitivity as sensitivity
    from mossquant.checkpoint.open import open_weights as open_weights
    from mossquant.checkpoint.pruned import Keep as Keep
    from mossquant.errors import InputError as InputError
    from mossquant.eval.bench import bench as bench
    from mossquant.eval.compare import compare as compare
    from mossquant.eval.generate import generate as generate
    from mossquant.eval.info import info as info
    from mossquant.eval.open import open_runner as open_runner
    from mossquant.eval.perplexity import perplexity as perplexity
    from mossquant.eval.report.demo import demo as demo
    from mossquant.eval.verify import verify as verify
    from mossquant.importing.mamba import import_mamba as import_mamba
    from mossquant.plan.recipe import recipes as recipes
    from mossquant.state_file import SavedState as SavedState
    from mossquant.state_file import load_state as load_state
    from mossquant.state_file import save_state as save_state
    from mossquant.targets.export import export as export
    from mossquant.targets.export import export_needs as export_needs
    from mossquant.targets.native.library import native_path as native_path
    from mossquant.text.text import Text as Text
    from mossquant.text.text import Tokenizer as Tokenizer
    from mossquant.training.train import train as train
    from mossquant.training.trainer import Schedule as Schedule

_WHERE = {
    "mossquant.calibration.calibrate": ["calibrate"],
    "mossquant.calibration.prune": ["prune"],
    "mossquant.calibration.quantize": ["quantize"],
    "mossquant.calibration.sensitivity": ["sensitivity"],
    "mossquant.checkpoint.open": ["open_weights"],
    "mossquant.checkpoint.pruned": ["Keep"],
    "mossquant.errors": ["InputError"],
    "mossquant.eval.bench": ["bench"],
    "mossquant.eval.compare": ["compare"],
    "mossquant.eval.generate": ["generate"],
    "mossquant.eval.info": ["info"],
    "mossquant.eval.open": ["open_runner"],
    "mossquant.eval.perplexity": ["perplexity"],
    "mossquant.eval.report.demo": ["demo"],
    "mossquant.eval.verify": ["verify"],
    "mossquant.importing.mamba": ["import_mamba"],
    "mossquant.plan.recipe": ["recipes"],
    "mossquant.state_file": ["SavedState", "load_state", "save_state"],
    "mossquant.targets.export": ["export", "export_needs"],
    "mossquant.targets.native.library": ["native_path"],
    "mossquant.text.text": ["Text", "Tokenizer"],
    "mossquant.training.train": ["train"],
    "mossquant.training.trainer": ["Schedule"],
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = list(_MODULE)


if find_spec("mossquant.eval") is None:
    raise ImportError(
        "this is the folder of mossquant's source, not the installed package; run Python in another folder, or with -P"
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'mossquant' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
