"""A comparison as a self-contained page: the tables and sentences of the terminal, and the curves over one another."""

from __future__ import annotations

from markupsafe import Markup

from harness.report import charts, page
from harness.report import compare_text as text
from harness.report.compare import Comparison

# Title, key in metrics.jsonl, split, words on the axis.
_CHARTS = (
    ("Test accuracy", "accuracy", "test", "accuracy"),
    ("Test accuracy of averaged weights (EMA)", "accuracy", "test_ema", "accuracy"),
    ("Test loss", "loss", "test", "loss"),
    ("Training loss", "loss", "train", "loss"),
    ("Learning rate", "lr", "train", "learning rate"),
    ("Throughput", "images_per_second", "train", "images a second"),
)


def comparison_page(comparison: Comparison) -> str:
    """The whole page, one HTML document that needs no other file."""
    groups, spread = len(comparison.groups), text.what_the_spread_is(comparison)
    runs = sum(len(group.runs) for group in comparison.groups)
    names = dict.fromkeys(group.name for group in comparison.groups)
    significance = page.Section("significance", "Beyond chance?", _pairs(comparison), text.WHAT_EACH_SAYS)
    return page.page(
        f"Comparison: {', '.join(names)}",
        [
            page.Section("groups", "Groups", _groups(comparison)),
            page.Section("differences", "Differences of the recipes", _differences(comparison)),
            page.Section("figures", "Figures", _figures(comparison), f"{spread.capitalize()}."),
            *([significance] if comparison.pairs else []),
            page.Section("curves", "Curves", _curves(comparison), "A colour a group; dashes tell its runs apart."),
        ],
        subtitle=f"{runs} run{'s' if runs != 1 else ''} in {groups} group{'s' if groups != 1 else ''}",
        notes=comparison.notes,
    )


def _groups(comparison: Comparison) -> Markup:
    rows = []
    for number, (group, line) in enumerate(zip(comparison.groups, text.group_lines(comparison), strict=True)):
        runs = Markup("<br>").join(f"{run.path} ({run.state})" for run in group.runs)
        rows.append([charts.swatch(_style(number, 0)) + f" {line}", runs])
    return page.table(["group", "runs"], rows, caption="Groups of runs")


def _differences(comparison: Comparison) -> Markup:
    letters = [group.letter for group in comparison.groups]
    if not comparison.differences:
        return page.missing(text.UNKNOWN_DIFFERENCES if len(letters) > 1 else "All runs are of one recipe.")
    rows = [[key, *map(text.value_text, values)] for key, values in comparison.differences.items()]
    return page.table(["key", *letters], rows, caption="What the recipes differ in")


def _figures(comparison: Comparison) -> Markup:
    letters = [group.letter for group in comparison.groups]
    if not comparison.figures:
        return page.missing("No run has any figures yet.")
    numeric = range(1, len(letters) + 1)
    return page.table(["figure", *letters], text.figure_rows(comparison), caption="Headline figures", numeric=numeric)


def _pairs(comparison: Comparison) -> Markup:
    parts, rows = [], []
    for pair in comparison.pairs:
        head, *sentences = text.pair_sentences(pair, comparison)
        items = Markup("").join(Markup("<li>{}</li>").format(sentence) for sentence in sentences)
        parts.append(Markup("<p><strong>{}</strong></p><ul>{}</ul>").format(head, items))
        for over, found, adjusted in (
            ("test images", pair.images, pair.images_p_adjusted),
            ("seeds", pair.seeds, pair.seeds_p_adjusted),
        ):
            cells = [text.NO_VALUE] * 5
            if found is not None:
                p_values = [text.p_text(found.p_value), text.p_text(adjusted)]
                cells = [text.points(found.difference), text.interval_text(found), *p_values, found.method]
            rows.append([f"{pair.second} − {pair.first}", over, *cells])
    header = ["groups", "over", "difference, points", "95% interval", "p", "p, Holm", "test"]
    table = page.table(header, rows, caption="Differences of test accuracy", numeric=(2, 3))
    return Markup("").join([*parts, table])


def _curves(comparison: Comparison) -> Markup:
    drawn = []
    for title, key, split, y_label in _CHARTS:
        series = []
        for number, group in enumerate(comparison.groups):
            for place, run in enumerate(group.runs):
                points = run.curve(split, key, kind="step" if key == "lr" else "epoch")
                seed = run.setting("seed")
                name = f"{group.letter}, {run.run_id if seed is None else f'seed {seed}'}"
                x, y = [point.epoch for point in points], [point.value for point in points]
                if points:
                    series.append(charts.Series(name, x, y, _style(number, place)))
        if series:
            words = f"{title} of {len(series)} run{'s' if len(series) != 1 else ''} by epoch."
            in_percent = key == "accuracy"
            drawn.append(
                charts.line_chart(
                    series, title=title, description=words, x_label="epoch", y_label=y_label, as_percent=in_percent
                )
            )
    return page.grid(*drawn) if drawn else page.missing("No run has any records yet.")


def _style(group: int, run: int) -> int:
    """One colour for a group, and dashes for its runs; eight styles on, the colour is the same."""
    return group % charts.COLOURS + charts.COLOURS * run
