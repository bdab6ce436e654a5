"""YAML documents as plain data with the place of every key: the layer below recipes.

YAML 1.2's core schema is used (`no` is a string, `1e-3` a number). Only scalars, lists and mappings with
string keys are data; tags, anchors and aliases are refused, so no text can run code or grow when it is read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.errors import HarnessError
from harness.recipe.packaged import is_name, names

KeyPath = tuple[str | int, ...]
# More is refused unread: ours have 1 kB.
MAX_BYTES = 50_000
MAX_DEPTH = 20
MAX_DIGITS = 1000

_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _CoreLoader(yaml.CSafeLoader):
    """PyYAML (with libyaml, as its wheels have it) and the tags of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and shape


class _CoreDumper(yaml.SafeDumper):
    """Quotes what the core schema would read as something else than a string."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Document:
    """Plain data, the place of each key (`file:line`), and what was wrong on the way."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    errors: list[HarnessError] = field(default_factory=list)


def dump(data: Any) -> str:
    """YAML text that `parse` reads back to equal data."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, width=100)


def load_plain(text: str) -> Any:
    """What `dump` wrote, as plain data without places; nothing is checked.

    Raises:
        yaml.YAMLError, ValueError: it is no YAML, too much of it, or more than plain data.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes are no recipe")
    if any(getattr(event, "anchor", None) for event in yaml.parse(text, Loader=_CoreLoader)):
        raise ValueError("anchors are not used in recipes, and may go round in circles")
    return yaml.load(text, Loader=_CoreLoader)


def read(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        HarnessError: the file is missing, no file, too large, not UTF-8 or not YAML at all.
    """
    where = str(path)
    try:
        if is_pipe(path):
            if (os.environ.get("WORLD_SIZE") or "1") != "1":
                raise HarnessError("several ranks cannot read one pipe", where=where, hint="Write it to a file first.")
        elif path.exists() and not path.is_file() and not path.is_dir():  # reading a device might never end
            raise HarnessError("is not a file", where=where, hint="Recipes are UTF-8 YAML files.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise HarnessError(f"cannot be read ({error.strerror})", where=where, hint=_neighbours(path)) from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HarnessError(
            f"not UTF-8 text (byte {error.start})", where=where, hint="Recipes are UTF-8 YAML files."
        ) from None
    return parse(text, where)


def is_pipe(path: Path) -> bool:
    """Whether a path is a pipe that this process was given, as `/dev/stdin` and the shell's `<(…)` are.

    One with a name on disk may have no writer, and opening it would never return.
    """
    return is_given(path) and path.is_fifo()


def is_given(path: Path) -> bool:
    """Whether a path is an open file of this process, a pipe or not; its folder says nothing of where it came from."""
    return str(path.parent) in ("/dev", "/dev/fd", "/proc/self/fd")


def parse(text: str, where: str) -> Document:
    """Read YAML text; `where` names it in messages.

    Raises:
        HarnessError: the text is too long or not YAML, or its root is not a mapping.
    """
    document = Document()
    node = _compose(text, where)
    if node is None:
        return document
    if not isinstance(node, yaml.MappingNode):
        raise HarnessError(
            "a recipe is a mapping of keys to values",
            where=f"{where}:1",
            hint="Begin with lines like `seed: 0`.",
        )
    document.data = _mapping(node, (), where, document, 0)
    return document


def parse_value(text: str, where: str) -> Any:
    """The value of a `key.path=value` override, by the same rules as in a file.

    Raises:
        HarnessError: the text is not one YAML value.
    """
    document = Document()
    node = _compose(text, where)
    value = None if node is None else _value(node, (), where, document, 0)
    if document.errors:
        raise document.errors[0]
    return value


def _compose(text: str, where: str) -> yaml.Node | None:
    if len(text) > MAX_BYTES:
        raise HarnessError(f"more than {MAX_BYTES:,} bytes are no recipe", where=where, hint="Is it a recipe?")
    try:
        _refuse_aliases_and_depth(text, where)
        return yaml.compose(text, Loader=_CoreLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        if "maximum nesting depth" in str(error):  # libyaml looks ahead for a key
            raise _too_deep(where + line) from None
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).split("\n")[0]
        raise HarnessError(
            f"not valid YAML: {problem}", where=where + line, hint="Check the indentation and quotes there."
        ) from None
    except RecursionError:
        raise _too_deep(where) from None
    except UnicodeEncodeError:
        shown = where.encode("utf-8", "backslashreplace").decode()
        raise HarnessError("not UTF-8 text", where=shown, hint="Recipes and overrides are UTF-8.") from None


def _too_deep(where: str) -> HarnessError:
    return HarnessError("nested too deeply", where=where, hint="A recipe has three levels.")


def _refuse_aliases_and_depth(text: str, where: str) -> None:
    """Before anything is built from it."""
    depth = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        assert event.start_mark is not None
        place = f"{where}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH + 1:  # the root is one
                raise _too_deep(place)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.NodeEvent) and event.anchor:  # of an alias too
            raise HarnessError(
                "anchors and aliases are not used in recipes",
                where=place,
                hint="Share settings through `base: other.yaml`.",
            )


def _value(node: yaml.Node, path: KeyPath, where: str, document: Document, depth: int) -> Any:
    place = f"{where}:{node.start_mark.line + 1}"
    document.places.setdefault(path, place)
    if depth > MAX_DEPTH:
        document.errors.append(_too_deep(place))
        return None
    if not isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] not in ("map", "seq"):
        return _refuse_tag(node, place, document)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, where, document, depth)
    if isinstance(node, yaml.SequenceNode):
        return [_value(n, (*path, i), where, document, depth + 1) for i, n in enumerate(node.value)]
    return _scalar(node, place, document)


def _mapping(node: yaml.MappingNode, path: KeyPath, where: str, document: Document, depth: int) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{where}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            document.errors.append(HarnessError("a key must be a word", where=place, hint="Write `key: value`."))
            continue
        key = key_node.value
        if key in data:
            document.errors.append(
                HarnessError(
                    f'duplicate key "{".".join(map(str, (*path, key)))}"',
                    where=place,
                    hint=f"It already stands at {document.places[(*path, key)]}; keep one of them.",
                )
            )
            continue
        document.places[(*path, key)] = place
        data[key] = _value(value_node, (*path, key), where, document, depth + 1)
    return data


def _scalar(node: yaml.Node, place: str, document: Document) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    text = str(node.value)
    try:
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                if len(text) > MAX_DIGITS:  # hexadecimal ones have no limit of their own
                    raise ValueError
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return text
    except ValueError:
        document.errors.append(HarnessError("the number is too long", where=place, hint="Write a shorter one."))
        return None
    return _refuse_tag(node, place, document)


def _refuse_tag(node: yaml.Node, place: str, document: Document) -> None:
    tag = f'the tag "{node.tag}" is not used in recipes'
    document.errors.append(HarnessError(tag, where=place, hint="Write a plain value."))


def _neighbours(path: Path) -> str:
    from harness.errors import nearest

    if is_name(path) and not path.is_dir():
        return f"{nearest(path.name, names())} `harness recipe list` describes them; else give a file."
    try:
        is_folder = path.is_dir()
        folder = path if is_folder else path.parent
        there = [p.name for p in folder.glob("*.yaml") if not p.name.startswith(".")]
    except OSError:
        there = []
    if not there:
        return "Check the path."
    return (
        f"Give a file in {folder}. {nearest('', there)}" if is_folder else f"In {folder}: {nearest(path.name, there)}"
    )
