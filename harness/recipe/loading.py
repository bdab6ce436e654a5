"""From a YAML file to a frozen `Recipe`: inheritance, overrides, and every error in one message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from harness.errors import HarnessError, ManyErrors, nearest
from harness.recipe import document as yaml_document
from harness.recipe.document import Document, KeyPath
from harness.recipe.rules import broken_rules
from harness.recipe.schema import ARGS_SCHEMAS, Recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with everything it inherits and the overrides of the command line.

    Args:
        path: a YAML file.
        overrides: `key.path=value` texts; the value is YAML.

    Raises:
        HarnessError: all that is wrong with it, each with file:line (or the override) and a HINT.
    """
    path = Path(path)
    document = _read_with_bases(path)
    document.data.setdefault("name", path.stem)
    changes = Document()
    for text in overrides:
        _apply_override(changes, text)
    _lay_over(document, changes)
    recipe = _validate(document, str(path))
    if document.errors:
        raise ManyErrors(str(path), document.errors)
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
    return path.parent / base


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
        document.errors += [_explain(e, document, where, Recipe, ()) for e in error.errors(include_url=False)]
    _validate_model_args(document, where)
    if recipe is not None:
        for key, what, hint in broken_rules(recipe):
            document.errors.append(_at(document, where, tuple(key.split(".")), f"{key}: {what}", hint))
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
        document.errors += [_explain(e, document, where, schema, ("model", "args")) for e in errors]


def _at(document: Document, where: str, path: KeyPath, what: str, hint: str | None) -> HarnessError:
    """An error at the place of the deepest part of `path` that was written somewhere."""
    for end in range(len(path), 0, -1):
        if path[:end] in document.places:
            return HarnessError(what, where=document.places[path[:end]], hint=hint)
    return HarnessError(what, where=where, hint=hint)


def _explain(error: Any, document: Document, where: str, schema: type[BaseModel], prefix: KeyPath) -> HarnessError:
    """A pydantic error in a recipe's words."""
    loc = tuple(error["loc"])
    path = (*prefix, *loc)
    key = ".".join(map(str, path)) or "recipe"
    owner = _section(schema, loc[:-1])
    context = error.get("ctx", {})
    given = repr(error.get("input"))
    given = given if len(given) <= 60 else given[:57] + "…"
    hint = _describe(owner, loc)
    match error["type"]:
        case "extra_forbidden":
            valid = list(owner.model_fields) if owner else []
            what, hint = f'unknown key "{key}"', nearest(str(loc[-1]), valid)
        case "missing":
            what = f'the key "{key}" is missing'
        case "literal_error":
            valid = [str(v) for v in _literal_values(owner, loc)]
            what, hint = f"{key}: {given} is not one of its values", nearest(str(error["input"]), valid)
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            sign = {
                "greater_than": "> ",
                "greater_than_equal": "≥ ",
                "less_than": "< ",
                "less_than_equal": "≤ ",
            }
            bound = next(iter(context.values()))
            what = f"{key}: must be {sign[error['type']]}{bound}, got {given}"
        case _:
            what = f"{key}: {error['msg'][0].lower() + error['msg'][1:]}, got {given}"
    return _at(document, where, path, what, hint)


def _section(schema: type[BaseModel], loc: Iterable[str | int]) -> type[BaseModel] | None:
    current: Any = schema
    for part in loc:
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field is not None else None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _describe(owner: type[BaseModel] | None, loc: KeyPath) -> str:
    """What the key means, as a hint."""
    field = owner.model_fields.get(str(loc[-1])) if owner and loc else None
    section = _section(owner, loc[-1:]) if owner and field is not None else None
    if section is not None:
        return f"{loc[-1]} is a section with the keys {', '.join(section.model_fields)}."
    if field is not None and field.description:
        return f"{loc[-1]}: {field.description}."
    return "`harness recipe schema` lists every key with its type."


def _literal_values(owner: type[BaseModel] | None, loc: KeyPath) -> tuple[Any, ...]:
    field = owner.model_fields.get(str(loc[-1])) if owner else None
    return get_args(field.annotation) if field is not None else ()
