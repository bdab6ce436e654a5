"""The sections of a report that need no checkpoint: figures, curves, recipe and provenance. Cheap, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from harness.report.axes import epoch_text
from harness.report.charts import Series, line_chart
from harness.report.page import Section, facts, figures, folded, grid, missing, table
from harness.runs import Point, Run, finite

SPLITS = {"train": "training", "test": "test", "test_ema": "test, averaged weights"}
MOST_ROWS = 100  # of the table of epochs
MOST_CHARACTERS = 40_000  # of a file that is shown as it is
LOG_FROM = 30.0  # the largest value over the smallest from which an axis is logarithmic

_SETTINGS = {
    "Network": "model.name",
    "Data": "data.source",
    "Epochs": "training.epochs",
    "Steps": "training.steps",
    "Batch": "training.global_batch_size",
    "Precision": "training.precision",
    "Optimizer": "optimizer.name",
    "Learning rate": "optimizer.lr",
    "Momentum": "optimizer.momentum",
    "Weight decay": "optimizer.weight_decay",
    "Schedule": "schedule.name",
    "Averaged weights (EMA)": "ema.decay",
    "Seed": "seed",
}
# Key in metrics.jsonl, title, words on the axis, what is drawn.
_RATES = (
    ("lr", "Learning rate", "learning rate", "Learning rate over optimizer steps."),
    ("images_per_second", "Throughput", "images a second", "Images a second over optimizer steps."),
    ("grad_norm", "Gradient norm", "L2 norm", "L2 norm of the gradient over optimizer steps."),
    ("loader_wait_seconds", "Waiting for the loader", "seconds", "Seconds a rank waited for its batches."),
)
# Split, key, heading and form of the columns of the table of epochs.
_COLUMNS = (
    ("train", "loss", "Training loss", ".4f"),
    ("train", "accuracy", "Training accuracy", ".2%"),
    ("test", "loss", "Test loss", ".4f"),
    ("test", "accuracy", "Test accuracy", ".2%"),
    ("test_ema", "accuracy", "Averaged weights", ".2%"),
)


def summary_section(run: Run) -> Section:
    """Headline figures and the settings that matter most."""
    settings = {name: _text(run.setting(key)) for name, key in _SETTINGS.items() if run.setting(key) is not None}
    if run.starts:
        settings |= {name: value for name, value in _origin(run.starts[-1]).items() if value}
    body = figures(_headlines(run))
    body += facts(settings, short=True) if settings else missing("The recipe cannot be read.")
    return Section("summary", "Summary", body)


def curves_section(run: Run) -> Section:
    """Loss and accuracy over steps, and the figures of each epoch."""
    if not any(run.curve(split, "loss", kind=kind) for split in SPLITS for kind in ("step", "epoch")):
        return Section("curves", "Loss and accuracy", missing("There are no records of training yet."))
    charts = []
    for key in ("loss", "accuracy"):
        drawn = []
        for style, (split, name) in enumerate(SPLITS.items()):
            steps = run.curve(split, key, kind="step") if split == "train" else []
            if points := steps or run.curve(split, key):
                drawn.append(_series(name, points, style))
        title = key.capitalize()
        words = f"{title} over optimizer steps."
        in_percent = key == "accuracy"
        charts.append(
            line_chart(drawn, title=title, description=words, x_label="step", y_label=key, as_percent=in_percent)
        )
    return Section("curves", "Loss and accuracy", grid(*charts) + _epoch_table(run))


def rates_section(run: Run) -> Section:
    """Learning rate, throughput and what else was recorded at the steps."""
    charts = []
    for key, title, label, words in _RATES:
        points = run.curve("train", key, kind="step")
        if not points:
            continue
        values = [point.value for point in points]
        # The others are read by their size, or as a schedule is drawn: a logarithmic axis hides both.
        log = key == "grad_norm" and min(values) > 0 and max(values) > LOG_FROM * min(values)
        drawn = [_series(title.lower(), points, 0)]
        axes = {"log_y": log, "from_zero": key != "grad_norm"}
        charts.append(line_chart(drawn, title=title, description=words, x_label="step", y_label=label, **axes))
    body = grid(*charts) if charts else missing("There are no records of training steps yet.")
    return Section("rates", "Learning rate and throughput", body)


def origin_section(run: Run) -> Section:
    """The recipe and provenance as their files have them."""
    parts = []
    starts = run.starts
    if starts:
        parts.append(facts(_details(starts[-1])))
    else:
        parts.append(missing("Where the run came from is not known: provenance.json is missing or broken."))
    if len(starts) > 1:
        rows = [[_moment(s.get("started")), _text(s.get("from_step")), _text(s.get("world_size"))] for s in starts]
        parts.append(table(["Started", "From step", "Ranks"], rows, caption="Starts of this run", numeric=[1, 2]))
    try:
        recipe = (run.path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
        broken = " (as the file has it; it is broken)" if not run.settings else ""
        parts.append(_file(f"Recipe{broken}", recipe))
    except OSError:
        parts.append(missing("The recipe cannot be shown: recipe.yaml is missing or cannot be read."))
    if run.provenance:
        parts.append(_file("Provenance", json.dumps(run.provenance, indent=2, ensure_ascii=False)))
    return Section("origin", "Recipe and provenance", Markup("").join(parts))


def _headlines(run: Run) -> dict[str, tuple[str, str]]:
    result = run.result or {}
    found: dict[str, tuple[str, str]] = {}
    if test := run.last_in("test"):
        found["Test accuracy"] = (f"{test.value:.2%}", f"{_counted(run, test)}epoch {test.epoch:g}")
    if best := run.best:
        by = ", averaged weights" if run.judged_by == "test_ema" else ""
        found["Best accuracy"] = (f"{best.value:.2%}", f"epoch {best.epoch:g}{by}")
    for split, key, name, form in (
        ("test_ema", "accuracy", "Averaged weights", ".2%"),
        ("test", "loss", "Test loss", ".4f"),
        ("train", "accuracy", "Training accuracy", ".2%"),
    ):
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
    left = _seconds_left(run)
    words = f"epoch {epoch_text(run.epoch)}" + (f" of {epoch_text(epochs)}" if epochs is not None else "")
    if run.state == "running" and left is not None:
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


def _counted(run: Run, point: Point) -> str:
    """How many test images were right at a point, where its record says so."""
    for record in reversed(run.records):
        if (record.get("kind"), record.get("split"), record["step"]) == ("epoch", "test", point.step):
            correct, total = finite(record.get("correct")), finite(record.get("total"))
            return f"{correct:,.0f} of {total:,.0f}, " if correct is not None and total else ""
    return ""


def _series(name: str, points: Sequence[Point], style: int) -> Series:
    return Series(name, [point.step for point in points], [point.value for point in points], style)


def _epoch_table(run: Run) -> Markup:
    """The figures of each epoch, or of some, evenly spaced, where there are too many."""
    curves = [{point.step: point for point in run.curve(split, key)} for split, key, _, _ in _COLUMNS]
    columns = list(zip(curves, _COLUMNS, strict=True))
    columns = columns if curves[-1] else columns[:-1]
    steps = sorted(set().union(*curves))
    if not steps:
        return Markup("")
    caption = "Figures by epoch"
    shown = steps
    if len(steps) > MOST_ROWS:
        shown = [steps[round(i * (len(steps) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
        caption += f", {len(shown)} of {len(steps)}"
    rows = []
    for step in shown:
        epoch = next(curve[step].epoch for curve in curves if step in curve)
        cells = [format(curve[step].value, form) if step in curve else "–" for curve, (*_, form) in columns]
        rows.append([f"{epoch:g}", f"{step:,}", *cells])
    header = ["Epoch", "Step", *(title for _, (_, _, title, _) in columns)]
    return folded(caption, table(header, rows, caption=caption, numeric=range(7)))


def _origin(start: Mapping[str, Any]) -> dict[str, str]:
    """Commit, date and device of a start."""
    git, gpus = start.get("git") or {}, start.get("gpus")
    commit = str(git.get("commit") or "")[:12]
    return {
        "Started": _moment(start.get("started")),
        "Commit": f"{commit} with changes" if commit and git.get("changed") else commit,
        "Device": ", ".join(gpus) if gpus else _text(start.get("cpu")),
    }


def _details(start: Mapping[str, Any]) -> dict[str, str]:
    command = start.get("command")
    found = _origin(start) | {
        "harness": _text(start.get("harness")),
        "Python": _text(start.get("python")),
        "Ranks": _text(start.get("world_size")),
        "Command": "harness " + " ".join(command) if command else "",
        "Images": _text((start.get("data") or {}).get("origin")),
        "Recipe SHA-256": _text(start.get("recipe_sha256")),
        "Packages": ", ".join(f"{name} {version}" for name, version in (start.get("libraries") or {}).items()),
    }
    return {name: value for name, value in found.items() if value not in ("", "–")}


def _file(summary: str, text: str) -> Markup:
    return folded(summary, Markup("<pre><code>{}</code></pre>").format(text[:MOST_CHARACTERS]))


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
