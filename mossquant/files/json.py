# SPDX-License-Identifier: Apache-2.0
"""JSON as this project reads it: of bounded size and depth, every key once, every number finite.

Python's own reader takes the last of two equal keys, reads NaN, and makes of a file of a few characters an item some
thirty times its size in memory. Nothing that we store needs that.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mossquant.errors import InputError
from mossquant.files.inputs import read_bytes

Stored = TypeVar("Stored")

LARGEST_SMALL = 1 << 20
"""Most bytes of a config, a manifest, or what a program says about itself."""
LARGEST = 1 << 24
"""Most bytes of a file with an entry for every tensor: some 30,000 of them. Read, it takes at most 400 MB."""

_DEEPEST = 32


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, nested deeper than 32, holds a key twice in one object, or a number that is not finite.
    """
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    level, depth = _containers([value]), 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST}")
        level = [inner for item in level for inner in _containers(item)]
    return value


def read_json(path: Path, *, largest: int, advice: str) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        largest: most bytes that it may have.
        advice: what to do where it cannot be read, without a full stop.

    Raises:
        InputError: unreadable, too large, or not JSON as above.
    """
    data = read_bytes(path, largest=largest, advice=advice)
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({str(error)[:120]}); {advice}") from None


def json_object(path: Path, *, largest: int = LARGEST_SMALL) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none, or none that can be read."""
    try:
        value = read_json(path, largest=largest, advice="")
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def parse_stored(values: Any, schema: type[Stored], *, where: str, noun: str, advice: str) -> Stored:
    """JSON of ours as what it stands for; it carries a version.

    Args:
        values: the JSON.
        schema: a pydantic model, or a dataclass, that says what it must hold.
        where: the file that it lies in, for the error.
        noun: what it should be, with its article, for the error.
        advice: what to do, one sentence.

    Raises:
        InputError: of another version, or not what `schema` says: all offenders at once.
    """
    if isinstance(values, dict) and "version" not in values:
        raise InputError(f"{where} is not {noun}: it carries no version. {advice}")
    if isinstance(values, dict) and values["version"] != 1:
        release = f"mossquant {values['release']}"[:50] if "release" in values else "a newer release"
        version = repr(values["version"])[:40]
        raise InputError(f"{where}: version {version} was written by {release}; use that release")
    return validated(values, schema, where=where, noun=noun, advice=advice)


def read_stored(path: Path, schema: type[Stored], *, noun: str, advice: str, largest: int = LARGEST_SMALL) -> Stored:
    """A JSON file of ours that carries a version; arguments as `parse_stored`, errors as that and `read_json`."""
    values = read_json(path, largest=largest, advice=advice[0].lower() + advice[1:].rstrip("."))
    return parse_stored(values, schema, where=str(path), noun=noun, advice=advice)


def validated(values: Any, schema: type[Stored], *, where: str, noun: str, advice: str) -> Stored:
    """`parse_stored` of JSON that carries no version of ours."""
    try:
        return TypeAdapter(schema).validate_json(json.dumps(values))
    except ValidationError as error:
        raise InputError.listing(f"{where} is not {noun}", _complaints(error), advice) from None


def _complaints(error: ValidationError) -> list[str]:
    """What is wrong with each value of a JSON that is not what a schema says."""
    offenders = []
    for item in error.errors(include_url=False):
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            complaint = "unknown key"
        else:
            value = "" if item["type"] == "missing" else f", not {repr(item['input'])[:60]}"
            complaint = item["msg"].lower() + value
        offenders.append(f"{'.'.join(map(str, item['loc']))[:120] or 'it'}: {complaint}")
    return offenders


def _containers(item: dict[str, Any] | list[Any]) -> list[dict[str, Any] | list[Any]]:
    children = item.values() if isinstance(item, dict) else item
    return [child for child in children if isinstance(child, dict | list)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:40]!r} is given twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value
