"""The curve of a learning-rate range test, in the terminal and as a page."""

from __future__ import annotations

import os
import re

from markupsafe import Markup, escape

from harness.report import page
from harness.report.charts import Series, line_chart
from harness.report.terminal import draw
from harness.training.lr_finder import LrRange

HEADROOM = 0.5  # of the fall from the first to the least loss: as much is drawn above the first


def render_curve(found: LrRange, *, size: os.terminal_size, colours: bool) -> str:
    """The smoothed loss over the rate."""
    if not found.smoothed:
        return "no loss was finite"
    curve = Series("smoothed", found.lrs, _drawn(found, found.smoothed))
    return draw("training loss", [curve], size=size, colours=colours, x_label="learning rate", log_x=True)


def render_suggestions(found: LrRange) -> str:
    """What the rules say, a line each, and how the test ended."""
    lines = [_end(found)]
    for suggestion in found.suggestions:
        if suggestion.lr is None:
            lines.append(f"none: {suggestion.reason}")
        else:
            lines.append(f"{suggestion.lr:.2e}  ({suggestion.rule}; {suggestion.source})")
    return "\n".join(dict.fromkeys(lines))


def curve_page(found: LrRange, recipe_name: str) -> str:
    """A self-contained page: losses, smoothed loss and suggested rates over a logarithmic axis."""
    losses, smoothed = _drawn(found, found.losses), _drawn(found, found.smoothed)
    series = [Series("loss", found.lrs, losses), Series("smoothed", found.lrs, smoothed)]
    ends = [min([*losses, *smoothed]), max([*losses, *smoothed])] if losses else []
    series += [Series(s.rule, [s.lr] * 2, ends) for s in found.suggestions if s.lr is not None]
    chart = line_chart(
        series,
        title="Loss over the learning rate",
        description=_end(found),
        x_label="learning rate",
        y_label="training loss",
        log_x=True,
    )
    rows = [[s.rule, _with_code(s.source), s.reason if s.lr is None else _rate(s.lr)] for s in found.suggestions]
    rates = page.table(["rule", "source", "rate"], rows, caption="Suggested rates")
    section = page.Section("curve", "Range test", chart + rates, lead=_end(found))
    return page.page(f"{recipe_name}: learning-rate range test", [section])


def _with_code(text: str) -> Markup:
    """What stands between backticks set as code."""
    return Markup(re.sub("`(.*?)`", r"<code>\1</code>", str(escape(text))))


def _rate(lr: float) -> Markup:
    return Markup('<span class="number">{:.2e}</span>').format(lr)


def _end(found: LrRange) -> str:
    end = "went to the largest rate" if found.diverged_at is None else f"diverged at lr {found.diverged_at:.2e}"
    return f"{len(found.losses)} steps, {end}; smoothed with beta {found.beta}"


def _drawn(found: LrRange, losses: list[float]) -> list[float]:
    """Losses as they are drawn: a diverging end would press all else flat."""
    first, least = (found.smoothed[0], min(found.smoothed)) if found.smoothed else (0.0, 0.0)
    highest = first + max(HEADROOM * (first - least), 1e-6)
    return [min(loss, highest) for loss in losses]
