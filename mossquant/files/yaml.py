# SPDX-License-Identifier: Apache-2.0
"""YAML as this project reads it: mappings, lists and plain scalars, with the line of every value.

Refused, because a recipe needs none of them and some are traps: anchors and aliases (which can expand without bound),
tags, keys given twice, keys that are not text, nesting deeper than 8, files above 128 kB.
"""

import math
from pathlib import Path

import yaml

from mossquant.errors import InputError
from mossquant.files.inputs import read_bytes

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]
Lines = dict[tuple[str | int, ...], int]
"""Path of a value, e.g. ("weights", 3, "format") → its line, counted from 1."""

_MAX_BYTES = 1 << 17
_MAX_DEPTH = 8


def _check_events(text: str) -> None:
    """Raise `yaml.MarkedYAMLError`: an anchor, an alias, a tag, or nesting that is too deep."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        problem, mark = None, event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not supported"
        elif getattr(event, "tag", None) is not None:
            problem = "tags are not supported"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth >= _MAX_DEPTH:
            problem = f"nested deeper than {_MAX_DEPTH}"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)  # type: ignore[arg-type]


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        InputError: missing, a folder, a pipe, unreadable, larger than 128 kB, empty, or not UTF-8.
    """
    data = read_bytes(path, largest=_MAX_BYTES, advice="give a YAML file of a few lines")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give a YAML file") from None
    if not text.strip():
        raise InputError(f"{path} is empty; give a YAML file")
    return text


def parse_yaml(text: str, *, where: str) -> tuple[Value, Lines]:
    """The value in a YAML text, and the line of each of its parts.

    Scalars are true/false, null, decimal integers and fractions, and text otherwise.

    Raises:
        InputError: not YAML, or something that is refused (see above), with the line.
    """
    lines: Lines = {}
    try:
        _check_events(text)
        node = yaml.compose(text, yaml.SafeLoader)
        return None if node is None else _value(node, (), lines), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "not YAML").split())
        raise InputError(f"{where}{at}: {problem}; mend the file") from None
    except (ValueError, OverflowError):  # of the library: "\U00110000", a version of thousands of digits
        raise InputError(f"{where} is not YAML (a character or number in it is out of range); mend the file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML ({' '.join(str(error).split())[:120]}); mend the file") from None


def _value(node: yaml.Node, path: tuple[str | int, ...], lines: Lines) -> Value:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Value] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            name = str(key.value)
            if name in mapping:
                raise yaml.MarkedYAMLError(problem=f"key {name[:40]!r} is given twice", problem_mark=key.start_mark)
            mapping[name] = _value(child, (*path, name), lines)
            lines[(*path, name)] = key.start_mark.line + 1
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*path, index), lines) for index, child in enumerate(node.value)]
    text = str(node.value)
    kind = node.tag.rpartition(":")[2]
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")
    if kind == "null":
        return None
    if kind == "int" and text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10:
        return int(text)
    if kind == "float" and len(text) < 30 and math.isfinite(float(text)):
        return float(text)
    return text
