"""From a YAML file to a frozen `Recipe`: inheritance, overrides, and every error in one message."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, ManyErrors
from harness.files import expand
from harness.recipe import document as yaml_document
from harness.recipe.document import Document, flatten, locate
from harness.recipe.explaining import check
from harness.recipe.schema import ARGS_SCHEMAS, Recipe, broken_rules

# Settings that decide how and where a training runs, not what it learns.
_MAY_CHANGE = ("name", "tracking.", "checkpoint.", "data.loader", "data.workers", "data.path")
_LENGTH = ("training.epochs", "training.steps")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with everything it inherits and the overrides (`key.path=value`, in YAML) of the command line.

    Args:
        path: a YAML file, a pipe such as /dev/stdin, or the name of a recipe that comes with the package.

    Raises:
        HarnessError: all that is wrong with it, each with file:line (or the override) and a HINT.
    """
    found = _with_overrides(_inherited(path), overrides)
    if isinstance(found, ManyErrors):
        raise found
    return found


def load_variants(path: str | Path, variants: Iterable[Sequence[str]]) -> list[Recipe | ManyErrors]:
    """One recipe under several sets of overrides, in their order: for each the recipe or all that is wrong with it.

    Raises HarnessError where the file, or one that it inherits, is missing, no YAML or a sweep.
    """
    inherited = _inherited(path)
    return [_with_overrides(copy.deepcopy(inherited), overrides) for overrides in variants]


def _inherited(path: str | Path) -> Document:
    """The file with its bases, under its name."""
    path = Path("/dev/stdin") if str(path) == "-" else locate(path)
    inherited = _read_with_bases(path)
    if {"recipe", "parameters"} <= inherited.data.keys():
        raise HarnessError("this is a sweep, not a recipe", where=str(path), hint=f"harness sweep {path}")
    inherited.data.setdefault("name", "stdin" if yaml_document.is_open_file(path) else path.stem)
    return inherited


def resolved_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load` reads back to an equal one."""
    return yaml_document.dump(recipe.model_dump(mode="json"))


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 (hex) over all settings: equal for equal recipes, whatever their files looked like."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors: nothing is required, since a `base:` may supply it."""
    schema = Recipe.model_json_schema()
    base = {"type": "string", "description": "path of a recipe to inherit from, relative to this file"}
    schema["properties"] = {"base": base, **schema["properties"]}
    schema.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def differences(left: Recipe, right: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys (dotted) in which two recipes differ, with both values."""
    a, b = (flatten(recipe.model_dump(mode="json")) for recipe in (left, right))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def changed_settings(before: Recipe, now: Recipe, *, other_length: bool = True) -> dict[str, tuple[Any, Any]]:
    """The differences between two recipes that make them two trainings; with `other_length` not their lengths."""
    ignored = _MAY_CHANGE + (_LENGTH if other_length else ())
    return {k: v for k, v in differences(before, now).items() if not k.startswith(ignored)}


def _read_with_bases(path: Path) -> Document:
    """The file merged over its `base:` chain; keys of the file win, lists are replaced whole."""
    chain, documents = [path], [yaml_document.read(path)]
    while (base := _pop_base(documents[-1], chain[-1])) is not None:
        place, seen = documents[-1].places[("base",)], [each.resolve() for each in chain]
        if base.resolve() in seen:
            names = " → ".join(each.name for each in [*seen[seen.index(base.resolve()) :], base.resolve()])
            hint = "Remove one of these `base:` lines."
            raise HarnessError(f"inheritance cycle: {names}", where=place, hint=hint)
        try:
            documents.append(yaml_document.read(base))
        except HarnessError as error:
            raise ManyErrors(str(path), [HarnessError(f"base: {error}", where=place)]) from None
        chain.append(base)
    merged = Document(str(path))
    for document in reversed(documents):
        _lay_over(merged, document)
    return merged


def _pop_base(document: Document, path: Path) -> Path | None:
    base = document.data.pop("base", None)
    if base is None:
        return None
    if not isinstance(base, str) or "\x00" in base or not base:
        document.errors.append(document.error_at(("base",), "base must be the path of a recipe", "base: seed.yaml"))
        return None
    return locate(expand(base, where="base"), Path() if yaml_document.is_open_file(path) else path.parent)


class _Whole(dict[str, Any]):
    """A mapping that replaces an inherited one instead of being merged into it."""


def _lay_over(document: Document, new: Document) -> None:
    """Merge `new` over what is inherited; `args` go when the model or optimizer they belong to is another one."""
    for section in ("model", "optimizer"):
        inherited, changed = document.data.get(section), new.data.get(section)
        if isinstance(inherited, dict) and isinstance(changed, dict):
            name = inherited.get("name", Recipe.model_fields[section].default.name)
            if changed.get("name", name) != name:
                inherited.pop("args", None)
    _merge(document.data, new.data)
    document.places |= new.places
    document.errors += new.errors


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and not isinstance(value, _Whole) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _with_overrides(document: Document, overrides: Sequence[str]) -> Recipe | ManyErrors:
    changes = Document(document.where)
    for text in overrides:
        try:
            _apply_override(changes, text)
        except HarnessError as error:
            changes.errors.append(error)
    _lay_over(document, changes)
    recipe = check(Recipe, document.data, document)
    _check_model_args(document)
    if recipe is not None:
        broken = ((tuple(key.split(".")), f"{key}: {what}", hint) for key, what, hint in broken_rules(recipe))
        document.errors += [document.error_at(*each) for each in broken]
    if recipe is None or document.errors:
        return ManyErrors(document.where, document.errors)
    return recipe


def _apply_override(changes: Document, text: str) -> None:
    where = f'override "{text}"'
    key, separator, value_text = text.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise HarnessError("not of the form key.path=value", where=where, hint="For example training.epochs=2.")
    if len(parts) > yaml_document.MAX_DEPTH:
        raise yaml_document.too_deep(where)
    value = yaml_document.parse_value(value_text, where)
    if isinstance(value, dict) and parts[1:] == ["args"]:
        value = _Whole(value)
    target: Any = changes.data
    for end, part in enumerate(parts[:-1], start=1):
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            what = f'"{".".join(parts[:end])}" holds no further keys'
            raise HarnessError(what, where=where, hint="Shorten the key.")
    _merge(target, {parts[-1]: value})
    changes.places |= {tuple(parts[:end]): where for end in range(1, len(parts) + 1)}


def _check_model_args(document: Document) -> None:
    model = document.data.get("model")
    if isinstance(model, dict) and isinstance(args := model.get("args", {}), dict):
        name = str(model.get("name", Recipe.model_fields["model"].default.name))
        if schema := ARGS_SCHEMAS.get(name):
            check(schema, args, document, ("model", "args"))
