"""The sections of a report that need no checkpoint: figures, curves, recipe and provenance. Cheap, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from harness.reporting.charts import Series, line_chart
from harness.reporting.listing import epoch_text
from harness.reporting.page import Section, facts, figures, folded, grid, missing, table
from harness.runs import Point, Run

SPLITS = {"train": "training", "test": "test", "test_ema": "test, averaged weights"}
MOST_ROWS = 100  # of the table of epochs
MOST_CHARACTERS = 40_000  # of a file that is shown as it is
LARGEST = 1e15  # of a number in a file; a larger one is no figure of a training
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


def summary_section(run: Run) -> Section:
    """Headline figures and the settings that matter most."""
    settings = {name: _text(run.setting(key)) for name, key in _SETTINGS.items() if run.setting(key) is not None}
    start = _starts(run)[-1:]
    if start:
        settings |= {name: value for name, value in _origin(start[0]).items() if value}
    body = figures(_headlines(run))
    body += facts(settings, short=True) if settings else missing("The recipe cannot be read.")
    return Section("summary", "Summary", body)


def curves_section(run: Run) -> Section:
    """Loss and accuracy over steps, and the figures of each epoch."""
    charts = [
        _chart(run, "loss", "Loss", "Loss over optimizer steps."),
        _chart(run, "accuracy", "Accuracy", "Accuracy over optimizer steps.", as_percent=True),
    ]
    rows = _epoch_rows(run)
    below = Markup("")
    if rows:
        shown = _some(rows, MOST_ROWS)
        caption = "Figures by epoch" + (f", {len(shown)} of {len(rows)}" if len(shown) < len(rows) else "")
        header = ["Epoch", "Step", "Training loss", "Training accuracy", "Test loss", "Test accuracy"]
        ema = any(row[6] != "–" for row in rows)
        header += ["Averaged weights"] if ema else []
        below = folded(caption, table(header, [row[: len(header)] for row in shown], caption=caption, numeric=range(7)))
    if not any(run.curve(split, "loss", kind=kind) for split in SPLITS for kind in ("step", "epoch")):
        return Section("curves", "Loss and accuracy", missing("There are no records of training yet."))
    return Section("curves", "Loss and accuracy", grid(*charts) + below)


def rates_section(run: Run) -> Section:
    """Learning rate, throughput and what else was recorded at the steps."""
    wanted = [
        ("lr", "Learning rate", "learning rate", "Learning rate over optimizer steps."),
        ("images_per_second", "Throughput", "images a second", "Images a second over optimizer steps."),
        ("grad_norm", "Gradient norm", "L2 norm", "L2 norm of the gradient over optimizer steps."),
        ("loader_wait_seconds", "Waiting for the loader", "seconds", "Seconds a rank waited for its batches."),
    ]
    charts = []
    for key, title, label, description in wanted:
        points = run.curve("train", key, kind="step")
        if points:
            values = [point.value for point in points]
            # The others are read by their size, or as a schedule is drawn: a logarithmic axis hides both.
            log = key == "grad_norm" and min(values) > 0 and max(values) > LOG_FROM * min(values)
            at_zero = (0.0, 0.0) if key != "grad_norm" else None
            drawn = [_series(title.lower(), points, 0)]
            charts.append(
                line_chart(drawn, title=title, description=description, x_label="step", y_label=label, log_y=log,
                           y_range=at_zero)
            )  # fmt: skip
    body = grid(*charts) if charts else missing("There are no records of training steps yet.")
    return Section("rates", "Learning rate and throughput", body)


def origin_section(run: Run) -> Section:
    """The recipe and provenance as their files have them."""
    parts = []
    starts = _starts(run)
    if starts:
        parts.append(facts(_details(starts[-1])))
        if len(starts) > 1:
            rows = [[_moment(s.get("started")), _text(s.get("from_step")), _text(s.get("world_size"))] for s in starts]
            parts.append(table(["Started", "From step", "Ranks"], rows, caption="Starts of this run", numeric=[1, 2]))
    else:
        parts.append(missing("Where the run came from is not known: provenance.json is missing or broken."))
    text = _file_text(run, "recipe.yaml")
    if text is None:
        parts.append(missing("The recipe cannot be shown: recipe.yaml is missing or cannot be read."))
    else:
        broken = " (as the file has it; it is broken)" if not run.settings else ""
        parts.append(folded(f"Recipe{broken}", Markup("<pre><code>{}</code></pre>").format(text)))
    if run.provenance:
        text = json.dumps(run.provenance, indent=2, ensure_ascii=False, default=str)[:MOST_CHARACTERS]
        parts.append(folded("Provenance", Markup("<pre><code>{}</code></pre>").format(text)))
    return Section("origin", "Recipe and provenance", Markup("").join(parts))


def _headlines(run: Run) -> dict[str, tuple[str, str]]:
    result = run.result or {}
    found: dict[str, tuple[str, str]] = {}
    if test := run.curve("test", "accuracy"):
        found["Test accuracy"] = (f"{test[-1].value:.2%}", f"{_counted(run, test[-1])}epoch {test[-1].epoch:g}")
    if run.best is not None:
        by = ", averaged weights" if run.judged_by == "test_ema" else ""
        found["Best accuracy"] = (f"{run.best.value:.2%}", f"epoch {run.best.epoch:g}{by}")
    for split, key, name, form in (
        ("test_ema", "accuracy", "Averaged weights", ".2%"),
        ("test", "loss", "Test loss", ".4f"),
        ("train", "accuracy", "Training accuracy", ".2%"),
    ):
        points = run.curve(split, key)
        if points:
            found[name] = (format(points[-1].value, form), f"epoch {points[-1].epoch:g}")
    rate = _number(result.get("images_per_second"))
    if rate is None and (points := run.curve("train", "images_per_second", kind="step")):
        rate = points[-1].value
    if rate is not None:
        found["Throughput"] = (f"{rate:,.0f}", "images a second")
    if (seconds := _number(result.get("seconds"))) is not None:
        found["Training time"] = (duration(seconds), f"{_text(result.get('step'))} steps")
    if (parameters := _number(result.get("parameters"))) is not None:
        found["Parameters"] = (f"{parameters:,.0f}", "")
    return found if found and run.state == "finished" else {"Progress": _progress(run), **found}


def _progress(run: Run) -> tuple[str, str]:
    """How far it is of how much, and while it trains how long the rest will take."""
    steps, epochs = run.length_steps, run.length_epochs
    words = f"epoch {epoch_text(run.epoch)}" + (f" of {epoch_text(epochs)}" if epochs is not None else "")
    if run.state == "running" and (left := seconds_left(run)) is not None:
        words += f", about {duration(left)} left"
    return f"step {run.step:,}" + (f" of {steps:,}" if steps is not None else ""), words


def seconds_left(run: Run) -> float | None:
    """Until the end at the pace since the latest start, evaluations included; None where nothing tells it yet."""
    from_step = _number((_starts(run) or [{}])[-1].get("from_step")) or 0
    times = {
        int(record["step"]): at
        for record in run.records
        if record["step"] > from_step and (at := _number(record.get("time_unix_seconds"))) is not None
    }
    if run.length_steps is None or len(times) < 2:
        return None
    first, last = min(times), max(times)
    return max(0.0, (run.length_steps - last) * (times[last] - times[first]) / (last - first))


def _counted(run: Run, point: Point) -> str:
    """How many test images were right at a point, where its record says so."""
    for record in reversed(run.records):
        if (record.get("kind"), record.get("split"), record.get("step")) == ("epoch", "test", point.step):
            correct, total = _number(record.get("correct")), _number(record.get("total"))
            return f"{correct:,.0f} of {total:,.0f}, " if correct is not None and total else ""
    return ""


def _chart(run: Run, key: str, title: str, description: str, *, as_percent: bool = False) -> Markup:
    series = []
    for style, (split, name) in enumerate(SPLITS.items()):
        kinds = ("step", "epoch") if split == "train" else ("epoch",)
        points = next((points for kind in kinds if (points := run.curve(split, key, kind=kind))), [])
        if points:
            series.append(_series(name, points, style))
    return line_chart(
        series, title=title, description=description, x_label="step", y_label=title.lower(), as_percent=as_percent
    )


def _series(name: str, points: Sequence[Point], style: int) -> Series:
    return Series(name, [point.step for point in points], [point.value for point in points], style)


def _epoch_rows(run: Run) -> list[list[str]]:
    columns: list[dict[int, Point]] = []
    for split, key in (("train", "loss"), ("train", "accuracy"), ("test", "loss"), ("test", "accuracy"),
                       ("test_ema", "accuracy")):  # fmt: skip
        columns.append({point.step: point for point in run.curve(split, key)})
    rows = []
    for step in sorted(set().union(*columns)):
        cells = [column.get(step) for column in columns]
        epoch = next(point.epoch for point in cells if point is not None)
        forms = (".4f", ".2%", ".4f", ".2%", ".2%")
        values = [format(p.value, form) if p is not None else "–" for p, form in zip(cells, forms, strict=True)]
        rows.append([f"{epoch:g}", f"{step:,}", *values])
    return rows


def _some(rows: list[list[str]], most: int) -> list[list[str]]:
    """At most so many rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _starts(run: Run) -> list[Mapping[str, Any]]:
    starts = run.provenance.get("starts")
    return [start for start in starts if isinstance(start, Mapping)] if isinstance(starts, list) else []


def _origin(start: Mapping[str, Any]) -> dict[str, str]:
    """Commit, date and device of a start."""
    git = start.get("git")
    commit = ""
    if isinstance(git, Mapping) and git.get("commit"):
        commit = str(git["commit"])[:12] + (" with changes" if git.get("changed") else "")
    gpus = start.get("gpus")
    device = ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else _text(start.get("cpu"))
    return {"Started": _moment(start.get("started")), "Commit": commit, "Device": device}


def _details(start: Mapping[str, Any]) -> dict[str, str]:
    found = _origin(start)
    command = start.get("command")
    data = start.get("data")
    libraries = start.get("libraries")
    found |= {
        "harness": _text(start.get("harness")),
        "Python": _text(start.get("python")),
        "Ranks": _text(start.get("world_size")),
        "Command": "harness " + " ".join(map(str, command)) if isinstance(command, list) else "",
        "Images": _text(data.get("origin")) if isinstance(data, Mapping) else "",
        "Recipe SHA-256": _text(start.get("recipe_sha256")),
    }
    if isinstance(libraries, Mapping):
        found["Packages"] = ", ".join(f"{name} {version}" for name, version in libraries.items())
    return {name: value for name, value in found.items() if value not in ("", "–")}


def _file_text(run: Run, name: str) -> str | None:
    try:
        with (run.path / name).open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_CHARACTERS)
    except OSError:
        return None


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
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if known else None
