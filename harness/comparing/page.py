"""A comparison as a self-contained page: the tables and sentences of the terminal, and the curves over one another."""

from __future__ import annotations

from markupsafe import Markup

from harness.comparing.comparison import Comparison
from harness.comparing.text import (
    NO_VALUE,
    UNKNOWN_DIFFERENCES,
    WHAT_EACH_SAYS,
    figure_rows,
    group_lines,
    p_text,
    pair_sentences,
    points,
    value_text,
    what_the_spread_is,
)
from harness.reporting import charts, page
from harness.runs import Run

# Title, key in metrics.jsonl, split, words on the axis, whether in per cent.
_CHARTS = (
    ("Test accuracy", "accuracy", "test", "accuracy", True),
    ("Test accuracy of averaged weights (EMA)", "accuracy", "test_ema", "accuracy", True),
    ("Test loss", "loss", "test", "loss", False),
    ("Training loss", "loss", "train", "loss", False),
    ("Learning rate", "lr", "train", "learning rate", False),
    ("Throughput", "images_per_second", "train", "images a second", False),
)


def comparison_page(comparison: Comparison) -> str:
    """The whole page, one HTML document that needs no other file."""
    letters = [group.letter for group in comparison.groups]
    sections = [
        page.Section("groups", "Groups", _groups(comparison)),
        page.Section("differences", "Differences of the recipes", _differences(comparison, letters)),
        page.Section(
            "figures", "Figures", _figures(comparison, letters), f"{what_the_spread_is(comparison).capitalize()}."
        ),
    ]
    if comparison.pairs:
        sections.append(page.Section("significance", "Beyond chance?", _pairs(comparison), WHAT_EACH_SAYS))
    sections.append(
        page.Section("curves", "Curves", _curves(comparison), "A colour a group; dashes tell its runs apart.")
    )
    names = dict.fromkeys(group.name for group in comparison.groups)
    runs = sum(len(group.runs) for group in comparison.groups)
    return page.page(
        f"Comparison: {', '.join(names)}",
        sections,
        subtitle=f"{runs} run{'s' if runs != 1 else ''} in {len(letters)} group{'s' if len(letters) != 1 else ''}",
        notes=comparison.notes,
    )


def _groups(comparison: Comparison) -> Markup:
    rows = [
        [charts.swatch(_style(number, 0)) + Markup(" {}").format(line), *_run_list(group.runs)]
        for number, (group, line) in enumerate(
            zip(comparison.groups, group_lines(comparison), strict=True),
        )
    ]
    return page.table(["group", "runs"], rows, caption="Groups of runs")


def _run_list(runs: list[Run]) -> list[Markup]:
    return [Markup("<br>").join(f"{run.path} ({run.state})" for run in runs)]


def _differences(comparison: Comparison, letters: list[str]) -> Markup:
    if not comparison.differences:
        return page.missing(UNKNOWN_DIFFERENCES if len(letters) > 1 else "All runs are of one recipe.")
    rows = [
        [key, *(value_text(value, whole=True) for value in values)] for key, values in comparison.differences.items()
    ]
    return page.table(["key", *letters], rows, caption="What the recipes differ in")


def _figures(comparison: Comparison, letters: list[str]) -> Markup:
    if not comparison.figures:
        return page.missing("No run has any figures yet.")
    numeric = range(1, len(letters) + 1)
    return page.table(["figure", *letters], figure_rows(comparison), caption="Headline figures", numeric=numeric)


def _pairs(comparison: Comparison) -> Markup:
    parts = []
    for pair in comparison.pairs:
        head, *sentences = pair_sentences(pair, comparison)
        items = Markup("").join(Markup("<li>{}</li>").format(sentence) for sentence in sentences)
        parts.append(Markup("<p><strong>{}</strong></p><ul>{}</ul>").format(head, items))
    rows = []
    for pair in comparison.pairs:
        for over, found, adjusted in (
            ("test images", pair.images, pair.images_p_adjusted),
            ("seeds", pair.seeds, pair.seeds_p_adjusted),
        ):
            if found is None:
                rows.append([f"{pair.second} − {pair.first}", over, *[NO_VALUE] * 5])
                continue
            interval = NO_VALUE if found.low is None or found.high is None else _interval(found.low, found.high)
            p_values = [NO_VALUE if p is None else p_text(p) for p in (found.p_value, adjusted)]
            difference = points(found.difference)
            rows.append([f"{pair.second} − {pair.first}", over, difference, interval, *p_values, found.method])
    header = ["groups", "over", "difference, points", "95% interval", "p", "p, Holm", "test"]
    table = page.table(header, rows, caption="Differences of test accuracy", numeric=(2, 3))
    return Markup("").join([*parts, table])


def _interval(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}"


def _curves(comparison: Comparison) -> Markup:
    drawn = []
    for title, key, split, y_label, as_percent in _CHARTS:
        series = []
        for number, group in enumerate(comparison.groups):
            for place, run in enumerate(group.runs):
                kind = "step" if key == "lr" else "epoch"
                curve = run.curve(split, key, kind=kind)
                if curve:
                    series.append(
                        charts.Series(
                            _name(group.letter, run),
                            [point.epoch for point in curve],
                            [point.value for point in curve],
                            _style(number, place),
                        )
                    )
        if series:
            words = f"{title} of {len(series)} run{'s' if len(series) != 1 else ''} by epoch."
            drawn.append(
                charts.line_chart(
                    series, title=title, description=words, x_label="epoch", y_label=y_label, as_percent=as_percent
                )
            )
    return page.grid(*drawn) if drawn else page.missing("No run has any records yet.")


def _name(letter: str, run: Run) -> str:
    seed = run.setting("seed")
    return f"{letter}, {run.run_id if seed is None else f'seed {seed}'}"


def _style(group: int, run: int) -> int:
    """One colour for a group, and dashes for its runs; eight styles on, the colour is the same."""
    return group % charts.COLOURS + charts.COLOURS * run
