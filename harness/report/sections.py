"""The sections of a report that need no answers of the network: figures, curves, recipe and provenance of a run, and
how far its network's branches see, its drawing and its layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from markupsafe import Markup

from harness.errors import HarnessError
from harness.models.dual_branch import DualBranchNet
from harness.models.summary import (
    NOTE_OTHER_MODELS,
    LayerField,
    constraints,
    measured_receptive_field,
    receptive_field,
    summarise,
)
from harness.report.charts import WIDTH, Series, drawing, epoch_text, line_chart, percent
from harness.report.explain import data_uri
from harness.report.lazy_checkpoint import LazyCheckpoint
from harness.report.page import Section, missing, render
from harness.runs import Point, Run, finite

SPLITS = {"train": "training", "test": "test", "test_ema": "test, averaged weights"}
MOST_ROWS = 100  # of the table of epochs
LOG_FROM = 30.0  # the largest value over the smallest from which an axis is logarithmic
BRANCHES = ("depthwise", "dilated")
MARGIN = 10  # around a drawing of fields

# Key in metrics.jsonl, title, words on the axis, what is drawn.
_RATES = (
    ("lr", "Learning rate", "learning rate", "Learning rate over optimizer steps."),
    ("images_per_second", "Throughput", "images a second", "Images a second over optimizer steps."),
    ("grad_norm", "Gradient norm", "L2 norm", "L2 norm of the gradient over optimizer steps."),
    ("loader_wait_seconds", "Waiting for the loader", "seconds", "Seconds a rank waited for its batches."),
)
# Figures of an epoch by split and key: their heading and form.
_FIGURES = {
    ("train", "loss"): ("Training loss", ".4f"),
    ("train", "accuracy"): ("Training accuracy", ".2%"),
    ("test", "loss"): ("Test loss", ".4f"),
    ("test", "accuracy"): ("Test accuracy", ".2%"),
    ("test_ema", "accuracy"): ("Averaged weights", ".2%"),
}


# --- the run


def summary_section(run: Run) -> Section:
    """Headline figures and the settings that matter most."""
    origin = _origin(run.starts[-1]) if run.starts else {}
    body = render("section_summary.html", headlines=_headlines(run), run=run, origin=origin, text=_text)
    return Section("summary", "Summary", body)


def curves_section(run: Run) -> Section:
    """Loss and accuracy over steps, and the figures of each epoch."""
    charts: list[Markup] = []
    for key in ("loss", "accuracy"):
        curves = {split: run.curve(split, key) for split in SPLITS}
        curves["train"] = run.curve("train", key, kind="step") or curves["train"]
        drawn = [_series(SPLITS[split], points, i) for i, (split, points) in enumerate(curves.items()) if points]
        if drawn or charts:
            axes: dict[str, Any] = {"x_label": "step", "y_label": key, "as_percent": key == "accuracy"}
            title = key.capitalize()
            charts.append(line_chart(drawn, title=title, description=f"{title} over optimizer steps.", **axes))
    why = "There are no records of training yet."
    body = render("section_curves.html", charts=charts, why=why, epochs=_epochs(run) if charts else None)
    return Section("curves", "Loss and accuracy", body)


def rates_section(run: Run) -> Section:
    """Learning rate, throughput and what else was recorded at the steps."""
    charts = []
    for key, title, label, words in _RATES:
        if points := run.curve("train", key, kind="step"):
            values = [point.value for point in points]
            # The others are read by their size, or as a schedule is drawn: a logarithmic axis hides both.
            log = key == "grad_norm" and min(values) > 0 and max(values) > LOG_FROM * min(values)
            axes: dict[str, Any] = {"x_label": "step", "y_label": label, "log_y": log, "from_zero": key != "grad_norm"}
            charts.append(line_chart([_series(title.lower(), points, 0)], title=title, description=words, **axes))
    why = "There are no records of training steps yet."
    body = render("section_curves.html", charts=charts, why=why, epochs=None)
    return Section("rates", "Learning rate and throughput", body)


def _series(name: str, points: Sequence[Point], style: int) -> Series:
    return Series(name, [point.step for point in points], [point.value for point in points], style)


def origin_section(run: Run) -> Section:
    """The recipe and provenance as their files have them."""
    try:
        recipe = (run.path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        recipe = None
    body = render(
        "section_origin.html",
        starts=[[_moment(s.get("started")), _text(s.get("from_step")), _text(s.get("world_size"))] for s in run.starts],
        origin=_origin(run.starts[-1]) if run.starts else {},
        recipe=recipe,
        readable=bool(run.settings),
        provenance=json.dumps(run.provenance, indent=2, ensure_ascii=False) if run.provenance else "",
    )
    return Section("origin", "Recipe and provenance", body)


def _headlines(run: Run) -> dict[str, tuple[str, str]]:
    """Figures by name, each with a few words below it."""
    result = run.result or {}
    found: dict[str, tuple[str, str]] = {}
    if test := run.last_in("test"):
        found["Test accuracy"] = (f"{test.value:.2%}", f"{_counted(run, test.step)}epoch {test.epoch:g}")
    if best := run.best:
        by = ", averaged weights" if run.judged_by == "test_ema" else ""
        found["Best accuracy"] = (f"{best.value:.2%}", f"epoch {best.epoch:g}{by}")
    for split, key in (("test_ema", "accuracy"), ("test", "loss"), ("train", "accuracy")):
        name, form = _FIGURES[split, key]
        if point := run.last_in(split, key):
            found[name] = (format(point.value, form), f"epoch {point.epoch:g}")
    rates = [point.value for point in run.curve("train", "images_per_second", kind="step")]
    rate = finite(result.get("images_per_second"))
    if rate is not None or rates:
        found["Throughput"] = (f"{rates[-1] if rate is None else rate:,.0f}", "images a second")
    if (seconds := finite(result.get("seconds"))) is not None:
        found["Training time"] = (duration(seconds), f"{_text(result.get('step'))} steps")
    if (parameters := finite(result.get("parameters"))) is not None:
        found["Parameters"] = (f"{parameters:,.0f}", "")
    return found if found and run.state == "finished" else {"Progress": _progress(run), **found}


def _progress(run: Run) -> tuple[str, str]:
    """How far it is of how much, and while it trains how long the rest will take."""
    epochs, steps = run.length
    words = f"epoch {epoch_text(run.epoch)}" + (f" of {epoch_text(epochs)}" if epochs is not None else "")
    if run.state == "running" and (left := _seconds_left(run)) is not None:
        words += f", about {duration(left)} left"
    return f"step {run.step:,}" + (f" of {steps:,}" if steps is not None else ""), words


def _seconds_left(run: Run) -> float | None:
    """Until the end at the pace since the latest start, evaluations included; None where nothing tells it yet."""
    from_step = (finite(run.starts[-1].get("from_step")) if run.starts else None) or 0
    times = {
        record["step"]: at
        for record in run.records
        if record["step"] > from_step and (at := finite(record.get("time_unix_seconds"))) is not None
    }
    _, steps = run.length
    if steps is None or len(times) < 2:
        return None
    first, last = min(times), max(times)
    return max(0.0, (steps - last) * (times[last] - times[first]) / (last - first))


def _counted(run: Run, step: int) -> str:
    """How many test images were right at a step, where its record says so."""
    for record in reversed(run.records):
        if (record.get("kind"), record.get("split"), record["step"]) == ("epoch", "test", step):
            correct, total = finite(record.get("correct")), finite(record.get("total"))
            return f"{correct:,.0f} of {total:,.0f}, " if correct is not None and total else ""
    return ""


def _epochs(run: Run) -> dict[str, Any] | None:
    """A table of the figures of each epoch, or of some, evenly spaced, where there are too many."""
    curves = [{point.step: point for point in run.curve(*key)} for key in _FIGURES]
    columns = [(*words, curve) for words, curve in zip(_FIGURES.values(), curves, strict=True)]
    columns = columns if curves[-1] else columns[:-1]
    steps = sorted(set().union(*curves))
    caption = "Figures by epoch"
    if len(steps) > MOST_ROWS:
        caption += f", {MOST_ROWS} of {len(steps)}"
        steps = [steps[round(i * (len(steps) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    rows = []
    for step in steps:
        epoch = next(curve[step].epoch for curve in curves if step in curve)
        cells = [format(curve[step].value, form) if step in curve else "–" for _, form, curve in columns]
        rows.append([f"{epoch:g}", f"{step:,}", *cells])
    header = ["Epoch", "Step", *(title for title, *_ in columns)]
    return {"caption": caption, "header": header, "rows": rows} if rows else None


def _origin(start: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a start."""
    git, gpus, command = start.get("git") or {}, start.get("gpus"), start.get("command")
    commit = str(git.get("commit") or "")[:12]
    found = {
        "Started": _moment(start.get("started")),
        "Commit": f"{commit} with changes" if commit and git.get("changed") else commit,
        "Device": ", ".join(gpus) if gpus else _text(start.get("cpu")),
        "harness": _text(start.get("harness")),
        "Python": _text(start.get("python")),
        "Ranks": _text(start.get("world_size")),
        "Command": "harness " + " ".join(command) if command else "",
        "Images": _text((start.get("data") or {}).get("origin")),
        "Recipe SHA-256": _text(start.get("recipe_sha256")),
        "Packages": ", ".join(f"{name} {version}" for name, version in (start.get("libraries") or {}).items()),
    }
    return {name: value for name, value in found.items() if value not in ("", "–")}


def duration(seconds: float) -> str:
    """Seconds as people say them: 12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _moment(value: Any) -> str:
    """A time of ISO 8601 as people read it: 2026-11-25 09:03 UTC."""
    try:
        return datetime.fromisoformat(value).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError):
        return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


OF_RUN = (summary_section, curves_section, rates_section, origin_section)


# --- its network


def fields_body(checkpoint: LazyCheckpoint) -> Markup:
    """The receptive fields at the end of both branches of each block, around a test image, and in a table."""
    model = checkpoint.untrained_model
    if not isinstance(model, DualBranchNet):
        return missing(NOTE_OTHER_MODELS)
    fields = {(row.block, row.path): row for row in receptive_field(model) if row.path in BRANCHES}  # the last of each
    rows = []
    for (block, branch), row in sorted(fields.items()):
        measured = measured_receptive_field(model, row)
        seen = percent(measured.coverage) if measured else "–"  # too large to be measured
        rows.append([str(block), branch, f"{max(row.field_px)} × {max(row.field_px)}", seen])
    try:
        image_HW3 = checkpoint.store.split("test").images_BHWC[0]
    except HarnessError:
        image_HW3 = np.full((checkpoint.recipe.data.image_size_px,) * 2 + (3,), 128, np.uint8)  # grey
    charts = [_field_drawing(image_HW3, list(fields.values()), branch) for branch in BRANCHES]
    return render("section_fields.html", charts=charts, rows=rows)


def _field_drawing(image_HW3: np.ndarray, fields: Sequence[LayerField], branch: str) -> Markup:
    """An image with the fields of one branch around its centre, to scale, one frame a block."""
    image_px = max(image_HW3.shape[:2])
    # That of all fields, so that both drawings have one.
    scale = (WIDTH - 2 * MARGIN) / max([image_px, *(max(row.field_px) for row in fields)])
    shown = [(max(row.field_px), row.block) for row in fields if row.path == branch]
    return drawing(
        "fields.html",
        branch=branch,
        image_px=image_px,
        picture=data_uri(image_HW3),
        picture_size=image_px * scale,
        frames=[(px * scale, block - 1) for px, block in shown],
        names=[(f"block {block}: {px} × {px} px", block - 1) for px, block in shown],
    )


def architecture_body(checkpoint: LazyCheckpoint) -> Markup:
    """The drawing, for dual-branch networks."""
    model, recipe = checkpoint.untrained_model, checkpoint.recipe
    if not isinstance(model, DualBranchNet):
        name = recipe.model.name
        return missing(
            f"The drawing is for dual-branch networks alone, and this is {name}; its layers are listed below."
        )
    chart = architecture_diagram(model, recipe.data.image_size_px)
    parameters = sum(p.numel() for p in model.parameters())
    return render("section_architecture.html", chart=chart, args=model.args, parameters=parameters)


def layers_body(checkpoint: LazyCheckpoint) -> Markup:
    """The layer table with its totals, and the constraints."""
    model, size = checkpoint.untrained_model, checkpoint.recipe.data.image_size_px
    summary = summarise(model, (3, size, size))
    met = [[c.name, "yes" if c.passed else "no", c.detail] for c in constraints(model)]
    layers = [
        [row.label, row.module, " × ".join(map(str, row.output_shape[1:])) or "–", f"{row.parameters:,}"]
        for row in summary.rows
    ]
    return render("section_layers.html", summary=summary, constraints=met, layers=layers)


def architecture_diagram(model: DualBranchNet, image_size_px: int) -> Markup:
    """Both branches of each block side by side, from the image at the top to the classes at the bottom."""
    args, size, blocks = model.args, image_size_px, []
    channels = args.stem or model.in_chans
    rows = zip(args.widths, args.unit_dilations(), [*args.transition_widths, 0], strict=True)
    for number, (widths, dilations, after) in enumerate(rows, start=1):
        joined = widths[-1] * (2 if args.merge == "concat" else 1)
        block = {"number": number, "channels": [channels, *widths], "dilations": dilations, "joined": joined}
        blocks.append(block | {"size": size, "after": after})
        channels, size = after, size // 2
    sizes = {"image_px": image_size_px, "in_chans": model.in_chans, "final_size": model.final_size}
    return drawing("architecture.html", args=args, blocks=blocks, classes=model.num_classes, **sizes)
