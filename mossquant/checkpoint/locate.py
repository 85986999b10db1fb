# SPDX-License-Identifier: Apache-2.0
"""What a PATH argument points at: a checkpoint, a quantized checkpoint, an artifact, or the bundled model by name."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL, read_json
from mossquant.plan.capabilities import CAPABILITIES

BUNDLED = "tiny"
"""Name of the checkpoint that ships in the package. It always means that one; a folder of this name is `./tiny`."""

_PROGRAMS = {known.suffix: name for name, known in CAPABILITIES.items() if known.suffix is not None}


@dataclass(frozen=True)
class Located:
    """A PATH argument, understood.

    Attributes:
        given: what the user wrote.
        path: the checkpoint folder, or the program file of an artifact.
        kind: "checkpoint", "quantized checkpoint", or the target of a program.
    """

    given: str
    path: Path
    kind: str

    def require(self, *kinds: str, verb: str) -> Path:
        """The path, if it is of one of these kinds.

        Raises:
            InputError: it is something else.
        """
        if self.kind not in kinds:
            raise InputError(
                f"{self.given} is of kind '{self.kind}', but {verb} needs: {' or '.join(kinds)}; give one of those"
            )
        return self.path


def asset_folder(name: str) -> Path:
    """A folder of files shipped inside the package."""
    return Path(str(files("mossquant").joinpath("assets", name)))


def locate(given: str | Path) -> Located:
    """Understand a PATH argument: a folder, a program file, or the name `tiny`.

    Raises:
        InputError: nothing is there, or it is nothing that mossquant knows.
    """
    try:
        located = _locate(str(given))
        whole = str(located.path.absolute())
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise InputError(
            f"{str(given)[:200]} cannot be opened ({error.strerror}); give a checkpoint folder or an artifact"
        ) from None
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise InputError(f"{whole} is not a name in UTF-8, which the runtimes need; rename it") from None
    return located


def _locate(text: str) -> Located:
    if not text:
        raise InputError(f"an empty path was given; give a checkpoint folder, an artifact, or the name {BUNDLED}")
    path = Path(text)
    if text == BUNDLED:
        return Located(text, asset_folder(BUNDLED), "checkpoint")
    if not path.exists():
        raise InputError(
            f"{text} does not exist, and nothing is downloaded; give a checkpoint folder, an artifact, or the name "
            f"{BUNDLED} (`mossquant import` takes folders of Hugging Face)"
        )
    if path.is_file():
        kind = _PROGRAMS.get(path.suffix)
        if kind is None:
            raise InputError(
                f"{text} is a file that mossquant does not know; give a folder, or a file that ends in "
                f"{', '.join(_PROGRAMS)}"
            )
        return Located(text, path, kind)
    programs = sorted(file for file in path.iterdir() if file.suffix in _PROGRAMS)
    config = path / "config.json"
    if programs and not config.is_file():
        if len(programs) > 1:
            raise InputError(
                f"{text} holds {len(programs)} programs; give one of them: {', '.join(str(p) for p in programs[:4])}"
            )
        if not programs[0].is_file():
            raise InputError(f"{programs[0]} is not a file; give an artifact that `mossquant export` wrote")
        return Located(text, programs[0], _PROGRAMS[programs[0].suffix])
    if not config.is_file():
        raise InputError(
            f"{text} holds neither config.json nor a program; give a checkpoint folder, an artifact, or the name "
            f"{BUNDLED}"
        )
    return Located(text, path, "quantized checkpoint" if _is_quantized(config) else "checkpoint")


def _is_quantized(config: Path) -> bool:
    try:
        values = read_json(config, largest=LARGEST_SMALL, advice="")
    except InputError:  # which whoever opens it says better
        return False
    return isinstance(values, dict) and "quantization_config" in values
