"""Recipe files: where they are, and their YAML as plain data with the place of every key.

YAML 1.2's core schema is used (`no` is a string, `1e-3` a number). Only scalars, lists and mappings with
string keys are data; tags, anchors and aliases are refused, so no text can run code or grow when it is read.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from harness.errors import HarnessError, nearest

KeyPath = tuple[str | int, ...]
# The recipes that come with the package: in a checkout a link to the top level's recipes/; in a wheel the files.
RECIPES = (Path(__file__).parents[1] / "recipes").resolve()
MAX_BYTES = 50_000  # ours have 1 kB
MAX_DEPTH = 20
MAX_DIGITS = 1000

_CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _CoreLoader(yaml.CSafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name and shape


class _CoreDumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern in _CORE_SCHEMA.items():
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


@dataclass
class Document:
    """Plain data, the place of each key (`file:line`), and what was wrong on the way; `where` names the file."""

    where: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    errors: list[HarnessError] = field(default_factory=list)

    def error_at(self, path: KeyPath, what: str, hint: str) -> HarnessError:
        """An error at the place of the deepest part of `path` that was written somewhere."""
        known = (self.places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.places)
        return HarnessError(what, where=next(known, self.where), hint=hint)


def packaged_names() -> list[str]:
    """The names of the packaged recipes, sorted: `harness train quickstart` works from any folder."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def describe(name: str) -> str:
    """The first sentence of a packaged recipe's comment."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return comment.partition(". ")[0].rstrip(".")


def locate(path: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe: `path` from `folder`, or the packaged one of that name where there is no such file."""
    packaged = RECIPES / f"{path}.yaml"
    found = folder / path
    return packaged if _is_name(Path(path)) and packaged.is_file() and not found.is_file() else found


def _is_name(path: Path) -> bool:
    return len(path.parts) == 1 and not path.suffix


def is_open_file(path: Path) -> bool:
    """Whether a path is a file that this process has open, as `/dev/stdin` and the shell's `<(…)` are."""
    return str(path.parent) in ("/dev", "/dev/fd", "/proc/self/fd")


def read(path: Path) -> Document:
    """Read a YAML file; HarnessError where it is missing, no file, too large, not UTF-8 or not YAML at all."""
    where, encoding = str(path), "Recipes are UTF-8 YAML files."
    try:
        if is_open_file(path) and path.is_fifo():
            if (os.environ.get("WORLD_SIZE") or "1") != "1":
                raise HarnessError("several ranks cannot read one pipe", where=where, hint="Write it to a file first.")
        # Reading a device might never end, and a named pipe may have no writer.
        elif path.exists() and not path.is_file() and not path.is_dir():
            raise HarnessError("is not a file", where=where, hint=encoding)
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        return parse(raw.decode("utf-8"), where)
    except OSError as error:
        raise HarnessError(f"cannot be read ({error.strerror})", where=where, hint=_neighbours(path)) from None
    except UnicodeDecodeError as error:
        raise HarnessError(f"not UTF-8 text (byte {error.start})", where=where, hint=encoding) from None


def _neighbours(path: Path) -> str:
    folder = path if os.path.isdir(path) else path.parent
    if _is_name(path) and folder != path:
        return f"{nearest(path.name, packaged_names())} `harness recipe list` describes them; else give a file."
    names = [os.path.basename(file) for file in glob.glob(f"{glob.escape(str(folder))}/*.yaml")]  # no hidden ones
    if not names:
        return "Check the path."
    if folder == path:
        return f"Give a file in {folder}. {nearest('', names)}"
    return f"In {folder}: {nearest(path.name, names)}"


def parse(text: str, where: str) -> Document:
    """Read YAML text, named `where` in messages; HarnessError where it is too long, not YAML or no mapping."""
    document = Document(where)
    node = _compose(text, where)
    if isinstance(node, yaml.MappingNode):
        document.data = _mapping(node, (), document)
    elif node is not None:
        hint = "Begin with lines like `seed: 0`."
        raise HarnessError("a recipe is a mapping of keys to values", where=f"{where}:1", hint=hint)
    return document


def parse_value(text: str, where: str) -> Any:
    """The value of a `key.path=value` override, by the same rules as in a file; HarnessError where it is none."""
    document = Document(where)
    node = _compose(text, where)
    value = None if node is None else _value(node, (), document)
    if document.errors:
        raise document.errors[0]
    return value


def dump(data: Any) -> str:
    """YAML text that `parse` reads back to equal data."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, width=100)


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one by dotted keys; empty ones are values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def too_deep(where: str) -> HarnessError:
    return HarnessError("nested too deeply", where=where, hint="A recipe has three levels.")


def _compose(text: str, where: str) -> yaml.Node | None:
    if len(text) > MAX_BYTES:
        raise HarnessError(f"more than {MAX_BYTES:,} bytes are no recipe", where=where, hint="Is it a recipe?")
    try:
        for event in yaml.parse(text, Loader=_CoreLoader):
            assert event.start_mark is not None
            place = f"{where}:{event.start_mark.line + 1}"
            if getattr(event, "anchor", None):  # of an alias too
                hint = "Share settings through `base: other.yaml`."
                raise HarnessError("anchors and aliases are not used in recipes", where=place, hint=hint)
            if tag := getattr(event, "tag", None):
                raise HarnessError(f'the tag "{tag}" is not used in recipes', where=place, hint="Write a plain value.")
        return yaml.compose(text, Loader=_CoreLoader)  # libyaml itself refuses more than 1000 levels
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = where if mark is None else f"{where}:{mark.line + 1}"
        if "maximum nesting depth" in str(error):
            raise too_deep(place) from None
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).split("\n")[0]
        hint = "Check the indentation and quotes there."
        raise HarnessError(f"not valid YAML: {problem}", where=place, hint=hint) from None
    except UnicodeEncodeError:
        shown = where.encode("utf-8", "backslashreplace").decode()
        raise HarnessError("not UTF-8 text", where=shown, hint="Recipes and overrides are UTF-8.") from None


def _value(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    place = f"{document.where}:{node.start_mark.line + 1}"
    document.places.setdefault(path, place)
    if len(path) > MAX_DEPTH:
        document.errors.append(too_deep(place))
        return None
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), document) for index, item in enumerate(node.value)]
    text = str(node.value)
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int" | "float" if len(text) > MAX_DIGITS:
            document.errors.append(HarnessError("the number is too long", where=place, hint="Write a shorter one."))
            return None
        case "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{document.where}:{key_node.start_mark.line + 1}"
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            document.errors.append(HarnessError("a key must be a word", where=place, hint="Write `key: value`."))
        elif key in data:
            what = f'duplicate key "{".".join(map(str, (*path, key)))}"'
            hint = f"It already stands at {document.places[(*path, key)]}; keep one of them."
            document.errors.append(HarnessError(what, where=place, hint=hint))
        else:
            document.places[(*path, key)] = place
            data[key] = _value(value_node, (*path, key), document)
    return data
