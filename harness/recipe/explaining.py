"""What pydantic finds wrong with a YAML document, in the user's words and with the place of each key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness.errors import HarnessError, closest, nearest
from harness.recipe.document import Document, KeyPath

MOST_MEANT = 2  # keys of a name that are shown; more would be a guess
# What timm, Lightning and Hugging Face's trainer call a key of ours.
CALLED_ELSEWHERE = {
    name: key
    for key, names in {
        "checkpoint.keep_last": "save_total_limit",
        "data.source": "dataset",
        "data.workers": "num_workers",
        "ema.decay": "model_ema model_ema_decay",
        "mix.cutmix_alpha": "cutmix",
        "mix.mixup_alpha": "mixup",
        "optimizer.lr": "learning_rate",
        "optimizer.name": "opt",
        "schedule.name": "lr_scheduler lr_scheduler_type sched",
        "tracking.log_every_steps": "log_every_n_steps log_interval logging_steps",
        "training.clip_grad_norm": "clip_grad gradient_clip_val max_grad_norm",
        "training.compile": "torchcompile",
        "training.epochs": "max_epochs num_epochs num_train_epochs",
        "training.gradient_accumulation_steps": "accumulate_grad_batches grad_accum_steps",
        "training.label_smoothing": "smoothing",
        "training.memory_format": "channels_last",
        "training.precision": "amp mixed_precision",
        "training.steps": "max_steps",
        "training.sync_batch_norm": "sync_bn",
    }.items()
    for name in names.split()
}
SCHEMA_HINT = "`harness recipe schema` lists every key with its type."
_SIGNS = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}

Model = TypeVar("Model", bound=BaseModel)


def check(
    schema: type[Model], data: Any, document: Document, prefix: KeyPath = (), *, otherwise: str = SCHEMA_HINT
) -> Model | None:
    """Data of a document as its schema has it; None with all that is wrong added to the document's errors.

    Args:
        prefix: where in the document the data is.
        otherwise: the hint for keys without a description.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        document.errors += [_explain(each, document, schema, prefix, otherwise) for each in found]
        return None


def keys_of(schema: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The keys of all sections of a schema, and of those within them."""
    for name in schema.model_fields:
        section = _section(schema, (name,))
        yield from ((name, *key) for key in (keys_of(section) if section else [()]))


def _explain(error: Any, document: Document, schema: type[BaseModel], prefix: KeyPath, otherwise: str) -> HarnessError:
    loc, given = tuple(error["loc"]), error["input"]
    path = (*prefix, *loc)
    key = ".".join(map(str, path)) or "recipe"
    *outer, name = [part for part in loc if isinstance(part, str)] or [""]  # items of a list are of its key
    owner, section = _section(schema, outer), _section(schema, loc)
    field = owner.model_fields.get(name) if owner else None
    hint = f"{name}: {field.description}." if field and field.description else otherwise
    match error["type"]:
        case "extra_forbidden":
            return document.error_at(path, f'unknown key "{key}"', _nearest_key(owner, schema, path, given))
        case "missing":
            return document.error_at(path, f'the key "{key}" is missing', hint)
        case "literal_error" if field:
            must, hint = "is not one of its values", nearest(str(given), map(str, get_args(field.annotation)))
            return document.error_at(path, f"{key}: {_shown(given)} {must}", hint)
        case "model_type":
            must = "must be a section of keys"
            if section and field:
                hint = f"{key} is a section with the keys {', '.join(section.model_fields)}."
                if "name" in section.model_fields and isinstance(given, str):
                    hint = f"Write {key}.name={given}, or in a file {key}: {{name: {given}}}."
        case "other_unit":
            must, hint = error["msg"], error["ctx"]["hint"]
        case _:
            must, advice = _of_type_and_range(error, error.get("ctx", {}))
            hint = advice + hint
    return document.error_at(path, f"{key}: {must}, got {_shown(given)}", hint)


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _of_type_and_range(error: Any, context: dict[str, Any]) -> tuple[str, str]:
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
            least, most = context.get("min_length"), context.get("max_length")
            return f"must have at {f'most {most}' if least is None else f'least {least}'} values", ""
    return error["msg"][0].lower() + error["msg"][1:], ""


def _is_number(given: Any) -> bool:
    """Whether a text would be a number without its quotes."""
    try:
        return isinstance(given, str) and float(given) is not None
    except ValueError:
        return False


def _nearest_key(owner: type[BaseModel] | None, schema: type[BaseModel], path: KeyPath, given: Any) -> str:
    """A hint for an unknown key: one that is like it in its section, or that is called so in another, or elsewhere."""
    name, valid = str(path[-1]), list(owner.model_fields) if owner else []
    close = closest(name, valid)
    keys = {".".join(key): key[-1] for key in keys_of(schema)}
    meant = CALLED_ELSEWHERE.get(name, "")
    if meant in keys:
        return f'Did you mean "{meant.rpartition(".")[0] if isinstance(given, dict) else meant}"?'
    if close is None or len(path) == 1:
        found = [key for key, last in keys.items() if last == name]
        if not found and close is None:
            found = [key for key, last in keys.items() if last.endswith(f"_{name}")]
        if 1 <= len(found) <= MOST_MEANT:
            return "Did you mean " + " or ".join(f'"{key}"' for key in found) + "?"
    return nearest(name, valid, within="".join(f"{part}." for part in path[:-1]))


def _section(schema: type[BaseModel], loc: Iterable[str | int]) -> type[BaseModel] | None:
    """The class of a section within a schema; None for what is no section."""
    current: Any = schema
    for part in loc:
        if get_origin(current) is dict:
            current = get_args(current)[1]
        else:
            field = getattr(current, "model_fields", {}).get(part)
            current = field.annotation if field is not None else None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None
