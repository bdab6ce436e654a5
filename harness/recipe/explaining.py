"""What pydantic finds wrong with a YAML document, in the user's words and with the place of each key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from harness.errors import HarnessError, closest, nearest
from harness.recipe.document import Document, KeyPath


def at(document: Document, where: str, path: KeyPath, what: str, hint: str | None) -> HarnessError:
    """An error at the place of the deepest part of `path` that was written somewhere."""
    for end in range(len(path), 0, -1):
        if path[:end] in document.places:
            return HarnessError(what, where=document.places[path[:end]], hint=hint)
    return HarnessError(what, where=where, hint=hint)


_SIGNS = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}
MOST_MEANT = 2  # keys of a name that are told; more would be a guess
# What timm, Lightning and Hugging Face's trainer call a key of ours.
CALLED_ELSEWHERE = {
    "accumulate_grad_batches": "training.gradient_accumulation_steps",
    "amp": "training.precision",
    "channels_last": "training.memory_format",
    "clip_grad": "training.clip_grad_norm",
    "cutmix": "mix.cutmix_alpha",
    "dataset": "data.source",
    "grad_accum_steps": "training.gradient_accumulation_steps",
    "gradient_clip_val": "training.clip_grad_norm",
    "learning_rate": "optimizer.lr",
    "log_every_n_steps": "tracking.log_every_steps",
    "log_interval": "tracking.log_every_steps",
    "logging_steps": "tracking.log_every_steps",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "max_epochs": "training.epochs",
    "max_grad_norm": "training.clip_grad_norm",
    "max_steps": "training.steps",
    "mixed_precision": "training.precision",
    "mixup": "mix.mixup_alpha",
    "model_ema": "ema.decay",
    "model_ema_decay": "ema.decay",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "num_workers": "data.workers",
    "opt": "optimizer.name",
    "save_total_limit": "checkpoint.keep_last",
    "sched": "schedule.name",
    "smoothing": "training.label_smoothing",
    "sync_bn": "training.sync_batch_norm",
    "torchcompile": "training.compile",
}
SCHEMA_HINT = "`harness recipe schema` lists every key with its type."


def explain(
    error: Any,
    document: Document,
    where: str,
    schema: type[BaseModel],
    prefix: KeyPath,
    *,
    otherwise: str = SCHEMA_HINT,
) -> HarnessError:
    """A pydantic error in the words of the file.

    Args:
        where: names the file.
        schema: the class that found the error, at `prefix` within the file.
        otherwise: the hint for keys without a description.
    """
    loc = tuple(error["loc"])
    path = (*prefix, *loc)
    key = ".".join(map(str, path)) or "recipe"
    owner = _section(schema, loc[:-1])
    context = error.get("ctx", {})
    given = repr(error.get("input"))
    given = given if len(given) <= 60 else given[:57] + "…"
    hint = _describe(owner, loc) or otherwise
    match error["type"]:
        case "extra_forbidden":
            what, hint = f'unknown key "{key}"', _nearest_key(owner, schema, path, error.get("input"))
        case "missing":
            what = f'the key "{key}" is missing'
        case "model_type":
            what = f"{key}: must be a section of keys, got {given}"
            hint = _name_in_section(_section(schema, loc), key, error["input"]) or hint
        case "literal_error":
            valid = [str(v) for v in _literal_values(owner, loc)]
            what, hint = f"{key}: {given} is not one of its values", nearest(str(error["input"]), valid)
        case "cannot_be_meant":
            what, hint = f"{key}: {error['msg']}, got {given}", context["hint"]
        case _:
            must, advice = _of_type_and_range(error, context)
            what, hint = f"{key}: {must}, got {given}", f"{advice}{hint}"
    return at(document, where, path, what, hint)


def _of_type_and_range(error: Any, context: Mapping[str, Any]) -> tuple[str, str]:
    """What a value must be, and advice where it is clear what was meant."""
    given, kind = error["input"], error["type"]
    match kind:
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            bound = next(iter(context.values()))
            percent = bound == 1 and kind.startswith("less") and 1 < given <= 100
            advice = f"If {given:g} % is meant, write {given / 100:g}. " if percent else ""
            return f"must be {_SIGNS[kind]} {bound}", advice
        case "bool_type":
            advice = "Write true or false, without quotes (yes, no, on and off are plain text in YAML 1.2). "
            return "must be true or false", advice
        case "int_type" | "float_type" if _is_number(given):
            return "must be a number, not a text", "Write it without quotes. "
        case "tuple_type":
            return "must be a list", ""
        case "too_short" | "too_long" if "actual_length" in context:
            least = kind == "too_short"
            bound = context["min_length" if least else "max_length"]
            return f"must have at {'least' if least else 'most'} {bound} values", ""
        case _:
            return error["msg"][0].lower() + error["msg"][1:], ""


def _is_number(given: Any) -> bool:
    """Whether a text would be a number without its quotes."""
    if not isinstance(given, str):
        return False
    try:
        float(given)
    except ValueError:
        return False
    return True


def _nearest_key(owner: type[BaseModel] | None, schema: type[BaseModel], path: KeyPath, given: Any) -> str:
    """A hint for an unknown key: one that is like it in its section, or that is called so in another, or elsewhere."""
    name, valid = str(path[-1]), list(owner.model_fields) if owner else []
    close = closest(name, valid)
    keys = [(".".join(key), key[-1]) for key in keys_of(schema)]
    meant = CALLED_ELSEWHERE.get(name, "")
    if meant in [key for key, _ in keys]:
        return f'Did you mean "{meant.rpartition(".")[0] if isinstance(given, dict) else meant}"?'
    if close is None or len(path) == 1:
        found = [key for key, last in keys if last == name]
        if not found and close is None:
            found = [key for key, last in keys if last.endswith(f"_{name}")]
        if 1 <= len(found) <= MOST_MEANT:
            return "Did you mean " + " or ".join(f'"{key}"' for key in found) + "?"
    return nearest(name, valid, within="".join(f"{part}." for part in path[:-1]))


def keys_of(schema: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The keys of all sections of a schema, and of those within them."""
    for name in schema.model_fields:
        section = _section(schema, (name,))
        if section is None:
            yield (name,)
        else:
            yield from ((name, *key) for key in keys_of(section))


def _name_in_section(section: type[BaseModel] | None, key: str, given: Any) -> str | None:
    if section is None or "name" not in section.model_fields or not isinstance(given, str):
        return None
    return f"Write {key}.name={given}, or in a file {key}: {{name: {given}}}."


def _section(schema: type[BaseModel], loc: Iterable[str | int]) -> type[BaseModel] | None:
    current: Any = schema
    for part in loc:
        if get_origin(current) is dict:
            current = get_args(current)[1]
            continue
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field is not None else None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _describe(owner: type[BaseModel] | None, loc: KeyPath) -> str | None:
    """What the key means, as a hint."""
    field = owner.model_fields.get(str(loc[-1])) if owner and loc else None
    section = _section(owner, loc[-1:]) if owner and field is not None else None
    if section is not None:
        return f"{loc[-1]} is a section with the keys {', '.join(section.model_fields)}."
    if field is not None and field.description:
        return f"{loc[-1]}: {field.description}."
    return None


def _literal_values(owner: type[BaseModel] | None, loc: KeyPath) -> tuple[Any, ...]:
    field = owner.model_fields.get(str(loc[-1])) if owner else None
    return get_args(field.annotation) if field is not None else ()
