# SPDX-License-Identifier: Apache-2.0
"""What a PATH argument points at: a checkpoint (quantized or not), an artifact, statistics, or the bundled model."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mossquant.errors import InputError
from mossquant.files.inputs import check_fetched
from mossquant.files.json import LARGEST, json_object
from mossquant.files.outputs import file_sha256
from mossquant.plan.capabilities import CAPABILITIES

BUNDLED = "tiny"
"""Name of the checkpoint that ships in the package. It always means that one; a folder of this name is `./tiny`."""
STATISTICS = "statistics"
"""Kind of a folder that `mossquant calibrate` wrote."""

_ADVICE = f"give a checkpoint folder, an artifact, or the name {BUNDLED}"
_PROGRAMS = {known.suffix: name for name, known in CAPABILITIES.items() if known.suffix is not None}


@dataclass(frozen=True)
class Located:
    """A PATH argument, understood.

    Attributes:
        given: what the user wrote.
        path: the folder, or the program file of an artifact.
        kind: "checkpoint", "quantized checkpoint", "statistics", or the target of a program.
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


def is_bundled_tokenizer(sha256: str | None) -> bool:
    """Whether a tokenizer of this SHA-256 (None: bytes) is the one of the bundled model."""
    return sha256 == file_sha256(asset_folder(BUNDLED) / "tokenizer.json")


def locate(given: str | Path) -> Located:
    """Understand a PATH argument: a folder, a program file, or the name `tiny`.

    Raises:
        InputError: nothing is there, or it is nothing that mossquant knows.
    """
    text, path = str(given), Path(given)
    if text == BUNDLED:
        return Located(text, asset_folder(BUNDLED), "checkpoint")
    try:
        located = _locate(text, path)
        str(path.absolute()).encode()
        return located
    except UnicodeEncodeError:
        raise InputError(f"{text} is not a name in UTF-8, which the runtimes need; rename it") from None
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise InputError(f"{text[:200]} cannot be opened ({error.strerror}); {_ADVICE}") from None


def _locate(text: str, path: Path) -> Located:
    if not text or not path.exists():
        raise InputError(
            f"{text or 'an empty path'} does not exist, and nothing is downloaded; {_ADVICE} (`mossquant import` takes "
            "folders of Hugging Face)"
        )
    config = path / "config.json"
    if config.is_file():
        quantized = "quantization_config" in json_object(config)
        return Located(text, path, "quantized checkpoint" if quantized else "checkpoint")
    files = [path] if path.is_file() else sorted(path.iterdir())
    programs = [file for file in files if file.suffix in _PROGRAMS]
    if len(programs) > 1:
        raise InputError(
            f"{text} holds {len(programs)} programs; give one of them: {', '.join(map(str, programs[:4]))}"
        )
    if not programs and json_object(path / "manifest.json", largest=LARGEST).get("kind") == STATISTICS:
        return Located(text, path, STATISTICS)
    if not programs and path.is_file():
        raise InputError(f"{text} is no program by its name, which ends in {', '.join(_PROGRAMS)}; {_ADVICE}")
    if not programs:
        raise InputError(f"{text} holds neither config.json nor a program ({' or '.join(_PROGRAMS)}); {_ADVICE}")
    if not programs[0].is_file():
        raise InputError(f"{programs[0]} is not a file; give an artifact that `mossquant export` wrote")
    check_fetched(programs[0])
    return Located(text, programs[0], _PROGRAMS[programs[0].suffix])
