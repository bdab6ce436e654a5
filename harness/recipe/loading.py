"""From a YAML file to a frozen `Recipe`: inheritance, overrides, and every error in one message."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import HarnessError, ManyErrors
from harness.files import expand
from harness.recipe import document as yaml_document
from harness.recipe.document import Document
from harness.recipe.explaining import at, explain
from harness.recipe.packaged import locate
from harness.recipe.rules import broken_rules
from harness.recipe.schema import ARGS_SCHEMAS, Recipe

# Settings that decide how and where to a training runs, not what it learns.
_MAY_CHANGE = ("name", "tracking.", "checkpoint.", "data.loader", "data.workers", "data.path")
_LENGTH = ("training.epochs", "training.steps")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with everything it inherits and the overrides of the command line.

    Args:
        path: a YAML file, a pipe such as /dev/stdin, or the name of a recipe that comes with the package.
        overrides: `key.path=value` texts; the value is YAML.

    Raises:
        HarnessError: all that is wrong with it, each with file:line (or the override) and a HINT.
    """
    (found,) = load_variants(path, [overrides])
    if isinstance(found, ManyErrors):
        raise found
    return found


def load_variants(path: str | Path, variants: Iterable[Sequence[str]]) -> list[Recipe | ManyErrors]:
    """One recipe under several sets of overrides, in their order: for each the recipe or all that is wrong with it.

    Raises:
        HarnessError: the file, or one that it inherits, is missing, no YAML or a sweep.
    """
    path = Path("/dev/stdin") if str(path) == "-" else locate(path)
    inherited = _read_with_bases(path)
    if {"recipe", "parameters"} <= inherited.data.keys():
        raise HarnessError("this is a sweep, not a recipe", where=str(path), hint=f"harness sweep {path}")
    inherited.data.setdefault("name", "stdin" if yaml_document.is_given(path) else path.stem)
    return [_with_overrides(copy.deepcopy(inherited), overrides, str(path)) for overrides in variants]


def _with_overrides(document: Document, overrides: Sequence[str], where: str) -> Recipe | ManyErrors:
    changes = Document()
    for text in overrides:
        _apply_override(changes, text)
    _lay_over(document, changes)
    recipe = _validate(document, where)
    if document.errors:
        return ManyErrors(where, document.errors)
    assert recipe is not None
    return recipe


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
    a, b = (_flatten(r.model_dump(mode="json")) for r in (left, right))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def changed_settings(before: Recipe, now: Recipe, *, other_length: bool = True) -> dict[str, tuple[Any, Any]]:
    """The differences between two recipes that make them two trainings, as `differences` gives them.

    Args:
        other_length: a longer or shorter training is the same one.
    """
    ignored = _MAY_CHANGE + (_LENGTH if other_length else ())
    return {k: v for k, v in differences(before, now).items() if not k.startswith(ignored)}


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read_with_bases(path: Path) -> Document:
    """The file merged over its `base:` chain; keys of the file win, lists are replaced whole."""
    chain: list[Path] = []
    documents: list[Document] = []
    current: Path | None = path
    while current is not None:
        resolved = current.resolve()
        if resolved in chain:
            names = " → ".join(p.name for p in [*chain[chain.index(resolved) :], resolved])
            raise HarnessError(
                f"inheritance cycle: {names}",
                where=documents[-1].places[("base",)],
                hint="Remove one of these `base:` lines.",
            )
        chain.append(resolved)
        try:
            document = yaml_document.read(current)
        except HarnessError as error:
            if documents:  # say which `base:` line led here
                raise ManyErrors(
                    str(path), [HarnessError(f"base: {error}", where=documents[-1].places[("base",)])]
                ) from None
            raise
        documents.append(document)
        current = _base_of(document, current)
    merged = Document()
    for document in reversed(documents):
        _lay_over(merged, document)
    return merged


class _Whole(dict[str, Any]):
    """A mapping that replaces an inherited one instead of being merged into it."""


def _lay_over(document: Document, new: Document) -> None:
    """Merge `new` over what is inherited; `args` go when the model or optimizer they belong to is another one."""
    for section in ("model", "optimizer"):
        inherited, changed = document.data.get(section), new.data.get(section)
        if isinstance(inherited, dict) and isinstance(changed, dict) and "name" in changed:
            name = inherited.get("name", Recipe.model_fields[section].default.name)
            if changed["name"] != name:
                inherited.pop("args", None)
    _merge(document.data, new.data)
    document.places |= new.places
    document.errors += new.errors


def _base_of(document: Document, path: Path) -> Path | None:
    base = document.data.pop("base", None)
    if base is None:
        return None
    if not isinstance(base, str) or "\x00" in base or not base:
        document.errors.append(
            HarnessError("base must be the path of a recipe", where=document.places[("base",)], hint="base: seed.yaml")
        )
        return None
    return locate(expand(base, where="base"), Path() if yaml_document.is_given(path) else path.parent)


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and not isinstance(value, _Whole) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _apply_override(document: Document, text: str) -> None:
    where = f'override "{text}"'
    key, separator, value_text = text.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        document.errors.append(
            HarnessError("not of the form key.path=value", where=where, hint="For example training.epochs=2.")
        )
        return
    if len(parts) > yaml_document.MAX_DEPTH:
        document.errors.append(HarnessError("nested too deeply", where=where, hint="A recipe has three levels."))
        return
    try:
        value = yaml_document.parse_value(value_text, where)
    except HarnessError as error:
        document.errors.append(error)
        return
    if isinstance(value, dict) and parts[1:] == ["args"]:
        value = _Whole(value)
    target = document.data
    for i, part in enumerate(parts[:-1]):
        if not isinstance(target.setdefault(part, {}), dict):
            document.errors.append(
                HarnessError(
                    f'"{".".join(parts[: i + 1])}" holds no further keys',
                    where=where,
                    hint="Shorten the key.",
                )
            )
            return
        target = target[part]
    _merge(target, {parts[-1]: value})
    for i in range(1, len(parts) + 1):
        document.places[tuple(parts[:i])] = where


def _validate(document: Document, where: str) -> Recipe | None:
    """Check types, names and ranges, then the rules between keys; errors go into the document."""
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        document.errors += [explain(e, document, where, Recipe, ()) for e in error.errors(include_url=False)]
    _validate_model_args(document, where)
    if recipe is not None:
        for key, what, hint in broken_rules(recipe):
            document.errors.append(at(document, where, tuple(key.split(".")), f"{key}: {what}", hint))
    return recipe


def _validate_model_args(document: Document, where: str) -> None:
    model = document.data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("args", {}), dict):
        return
    schema = ARGS_SCHEMAS.get(str(model.get("name", Recipe.model_fields["model"].default.name)))
    if schema is None:
        return
    try:
        schema.model_validate(model.get("args", {}))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        document.errors += [explain(e, document, where, schema, ("model", "args")) for e in errors]
