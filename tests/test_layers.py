# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: kernels → mossquant → calibration, targets → eval → command line. Read from the sources.

Also here, because they are read from the same sources: every file opens with its licence, and nothing unpickles.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each folder may import of ours, besides itself.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "mossquant": {"kernels"},
    "calibration": {"mossquant", "kernels"},
    "targets": {"mossquant", "kernels"},
    "eval": {"mossquant", "kernels", "calibration", "targets"},
}
# The rooms of the folder mossquant: each may import those before it; what lies beside them may import all but the last.
ROOMS = ("errors", "release", "progress", "device", "files", "formats", "model", "text", "plan")
ROOMS += ("checkpoint", "importing", "training")
# The command line and the lazy public functions lie above all, and load what they need when they need it.
TOP = ("mossquant/__init__.py", "mossquant/__main__.py", "mossquant/cli/")
FOLDERS = (*ALLOWED, "tests", "bench", "examples", "docs")
INSTALLED_INSIDE = set(ALLOWED) - {"mossquant"}

# Whatever runs code out of a file.
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
SOURCES = {".py", ".c", ".cc", ".h", ".inc"}


def files(*suffixes: str) -> list[Path]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def package_of(module: str) -> str:
    """The folder that a module of ours lies in: mossquant.eval.compare → eval, mossquant.model.config → mossquant."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in INSTALLED_INSIDE else "mossquant"


def imports(tree: ast.AST, where: str) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import, wherever it stands, and of names given to `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = where.removesuffix(".py").split("/")[: -node.level]
                above = above if above[:1] in (["mossquant"], ["tests"]) else ["mossquant", *above]
                base = ".".join([*above, *([base] if base else [])])
            yield node.lineno, base
            # from mossquant import eval: the name may be a folder or a module.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names if base == "mossquant")
        elif isinstance(node, ast.Constant) and re.fullmatch(r"mossquant(\.\w+)+", str(node.value)):
            yield node.lineno, str(node.value)


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported, `if TYPE_CHECKING:` and functions left out."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def wrong_arrows(where: str, source: str) -> list[str]:
    """What is wrong with the imports of the file at `where`, a path from the root."""
    tree, folder = ast.parse(source), where.split("/")[0]
    wrong = []
    for line, module in imports(tree, where):
        top = module.split(".")[0]
        if top in INSTALLED_INSIDE:
            wrong.append(f"{where}:{line} imports {module}; installed it is mossquant.{module}")
        elif top in ("tests", "bench") and top != folder:
            wrong.append(f"{where}:{line} imports {module}, which is not installed")
        elif top != "mossquant" or folder not in ALLOWED or where.startswith(TOP):
            continue
        elif re.match(r"mossquant\.(cli|__main__)\b", module):
            wrong.append(f"{where}:{line} imports {module}, which lies above {folder}")
        elif package_of(module) not in ALLOWED[folder] | {folder}:
            wrong.append(f"{where}:{line} imports {module}, and {folder} may not import {package_of(module)}")
        elif module.count(".") == 1 and package_of(module) == "mossquant" and not is_module(module):
            wrong.append(f"{where}:{line} imports {module}, a public function that lies above {folder}")
        elif package_of(module) == "mossquant" and room_of(module) > room_of(where.replace("/", ".")):
            wrong.append(f"{where}:{line} imports {module}, which lies in a room above its own")
    if where.startswith(TOP):
        for statement in at_import(tree):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                early = [module for _, module in imports(statement, where) if package_of(module) in INSTALLED_INSIDE]
                wrong += [f"{where}:{statement.lineno} imports {module} outside its functions" for module in early]
    return wrong


def room_of(module: str) -> int:
    """Place of a module's room among `ROOMS`; what lies beside them, and the other folders, come after all."""
    room = (*module.split("."), ROOMS[0])[1]
    return ROOMS.index(room) if module.startswith("mossquant") and room in ROOMS else len(ROOMS)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def unpicklings(where: str, source: str) -> list[str]:
    """Calls that could run code out of a file."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module, _, function = name.rpartition(".")
        if (module in UNPICKLERS and function in ("load", "loads", "open", "Unpickler")) or name == "Unpickler":
            wrong.append(f"{where}:{node.lineno} calls {name}")
        if function == "load" and options.get("weights_only", "False" if module == "torch" else "True") != "True":
            wrong.append(f"{where}:{node.lineno} calls {name} without weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            wrong.append(f"{where}:{node.lineno} calls {name} with allow_pickle")
        if name in ("yaml.load", "yaml.load_all") and "Safe" not in ast.unparse(node):
            wrong.append(f"{where}:{node.lineno} calls {name} without a safe loader")
        if name in ("eval", "exec"):
            wrong.append(f"{where}:{node.lineno} calls {name}")
    return wrong


@pytest.mark.parametrize("check", [wrong_arrows, unpicklings], ids=lambda check: check.__name__)
def test_every_file(check: type) -> None:
    paths = files(".py")
    assert len(paths) > 50, "the sources are not where they are looked for"
    assert not sorted(path for path in ROOT.glob("*.py")), "no Python at the top level"
    assert [line for path in paths for line in check(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))] == []


def test_every_file_opens_with_its_licence() -> None:
    without = []
    for path in files(*SOURCES):
        lines = path.read_text("utf-8").splitlines()[:2]
        if lines and not any(re.fullmatch(r"(#|//|/\*) SPDX-License-Identifier: Apache-2\.0", line) for line in lines):
            without.append(path.relative_to(ROOT).as_posix())
    assert without == []


# (file, line of source, whether it is refused)
ARROWS = [
    ("kernels/scan/autograd.py", "from mossquant.kernels import _native", False),
    ("kernels/scan/autograd.py", "from mossquant.errors import InputError", True),
    ("mossquant/model/scan.py", "from mossquant.kernels.scan import selective_scan", False),
    ("mossquant/plan/plan.py", "def f():\n    import mossquant.eval.compare", True),
    ("mossquant/plan/plan.py", "from mossquant import eval", True),
    ("mossquant/plan/plan.py", "from mossquant import errors", False),
    ("mossquant/plan/plan.py", "from mossquant import quantize", True),
    ("mossquant/plan/plan.py", "from ..eval import compare", True),
    ("mossquant/plan/plan.py", "from mossquant.checkpoint.checkpoint import Checkpoint", True),
    ("mossquant/state_file.py", "from mossquant.checkpoint.manifest import Sha256", False),
    ("mossquant/plan/plan.py", "import_module('mossquant.calibration.nearest')", True),
    ("calibration/quantize.py", "from mossquant.targets import artifact", True),
    ("calibration/quantize.py", "from mossquant.calibration.nearest import SOLVERS", False),
    ("targets/onnx/lower.py", "from mossquant.calibration.nearest import SOLVERS", True),
    ("targets/onnx/lower.py", "from mossquant.plan.plan import Plan", False),
    ("eval/report/demo.py", "from mossquant.calibration.quantize import quantize", False),
    ("eval/report/demo.py", "from mossquant.cli.main import app", True),
    ("eval/report/demo.py", "import calibration", True),
    ("mossquant/cli/main.py", "def f():\n    from mossquant.eval.report.demo import demo", False),
    ("mossquant/cli/main.py", "from mossquant.eval.report.demo import demo", True),
    ("mossquant/cli/main.py", "try:\n    import mossquant.targets\nexcept ImportError:\n    pass", True),
    ("mossquant/cli/main.py", "if TYPE_CHECKING:\n    from mossquant.eval.report.demo import demo", False),
    ("tests/eval/test_demo.py", "from eval.demo import demo", True),
    ("tests/eval/test_demo.py", "from .bounds import X", False),
    ("bench/peers.py", "import targets.onnx", True),
]


@pytest.mark.parametrize(("where", "source", "refused"), ARROWS)
def test_arrows(where: str, source: str, refused: bool) -> None:
    assert bool(wrong_arrows(where, source)) == refused


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("torch.load(p, weights_only=True)", False),
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=0)", True),
        ("pickle.loads(b)", True),
        ("pickle.dumps(b)", False),
        ("json.load(f)", False),
        ("np.load(p)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("yaml.load(t, Loader=yaml.SafeLoader)", False),
        ("yaml.load(t, Loader=yaml.Loader)", True),
        ("model.eval()", False),
        ("eval(text)", True),
    ],
)
def test_unpicklings(source: str, refused: bool) -> None:
    assert bool(unpicklings("x.py", source)) == refused
