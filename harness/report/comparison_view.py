"""A comparison as text for a terminal, and as a self-contained page with the same sentences and the curves over one
another."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness.report import charts, page
from harness.report.compare import Comparison, Estimate, Pair

LEVEL = 0.05
MEASURED = ("seconds", "images_per_second")  # figures by a clock
NO_VALUE = "-"
PLAIN_WIDTH = 100  # where there is no terminal
WHAT_EACH_SAYS = (
    "Over test images: whether these trained networks would differ on other images of the kind too. Over seeds: "
    "whether other trainings would differ on these images too. What only the images tell may be the luck of the seeds."
)
UNKNOWN_DIFFERENCES = "What these recipes differ in is not known, since not all of them can be read."
LONGEST_VALUE = 28
# Title, key in metrics.jsonl, split, words on the axis.
_CHARTS = (
    ("Test accuracy", "accuracy", "test", "accuracy"),
    ("Test accuracy of averaged weights (EMA)", "accuracy", "test_ema", "accuracy"),
    ("Test loss", "loss", "test", "loss"),
    ("Training loss", "loss", "train", "loss"),
    ("Learning rate", "lr", "train", "learning rate"),
    ("Throughput", "images_per_second", "train", "images a second"),
)


def render(comparison: Comparison, *, width: int | None) -> str:
    """The whole comparison, for a terminal of so many columns; None where there is none."""
    columns = max(40, width or PLAIN_WIDTH)
    letters = [group.letter for group in comparison.groups]
    parts = ["\n".join(_wrapped(line, columns) for line in group_lines(comparison))]
    if comparison.differences:
        rows = [[key, *map(value_text, values.values())] for key, values in comparison.differences.items()]
        rows = [
            [key, *(v if len(v) <= LONGEST_VALUE else f"{v[: LONGEST_VALUE - 1]}…" for v in row)] for key, *row in rows
        ]
        parts.append(_tables(["recipe", *letters], rows, columns))
    elif len(letters) > 1:
        parts.append(_wrapped(UNKNOWN_DIFFERENCES, columns))
    if comparison.figures:
        below = _wrapped(f"({what_the_spread_is(comparison)})", columns, further="")
        parts.append(f"{_tables(['figure', *letters], figure_rows(comparison), columns)}\n{below}")
    for pair in comparison.pairs:
        head, *sentences = pair_sentences(pair, comparison)
        parts.append("\n".join([_wrapped(head, columns), *(_wrapped(s, columns, "  ") for s in sentences)]))
    if any(pair.images or pair.seeds for pair in comparison.pairs):
        parts.append(_wrapped(WHAT_EACH_SAYS, columns, further=""))
    if comparison.notes:
        parts.append("\n".join(_wrapped(f"NOTE {note}", columns) for note in comparison.notes))
    return "\n\n".join(parts)


def group_lines(comparison: Comparison) -> Iterator[str]:
    """Each group with its recipe, the number of its runs and their seeds."""
    for group in comparison.groups:
        seeds = sorted((str(run.seed) for run in group.runs if run.seed is not None), key=lambda s: (len(s), s))
        words = f", seed{'s' if len(seeds) != 1 else ''} {', '.join(seeds)}" if seeds else ""
        yield f"{group.letter}  {group.name}: {_counted(len(group.runs), 'run')}{words}"


def what_the_spread_is(comparison: Comparison) -> str:
    """What ± means, with the number of runs."""
    counts = {len(group.runs) for group in comparison.groups}
    if counts == {1}:
        return "a run each"
    over = "mean ± sample standard deviation over the runs of a group"
    if len(counts) > 1:
        return f"{over}, n differs, see above"
    (n,) = counts
    fewer = any(0 < group["n"] < n for figure in comparison.figures for group in figure["groups"].values())
    return f"{over}, n = {n}{' unless it is told' if fewer else ''}"


def figure_rows(comparison: Comparison) -> list[list[str]]:
    """The headline figures as rows of a table; with n where not all runs of a group have the figure."""
    rows = []
    for figure in comparison.figures:
        row = [figure["title"]]
        for group in comparison.groups:
            found = figure["groups"][group.letter]
            n = f" (n = {found['n']})" if 0 < found["n"] < len(group.runs) else ""
            row.append(spread_text(figure["key"], found) + n)
        rows.append(row)
    return rows


def spread_text(key: str, figure: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation of a group's figure, with no more digits than it means."""
    values, mean, deviation = figure["values"], figure["mean"], figure["standard_deviation"]
    if not values:
        return NO_VALUE
    if key.endswith("accuracy"):
        return f"{mean:.2%}" if deviation is None else f"{100 * mean:.2f} ± {100 * deviation:.2f}%"
    if not deviation and (key == "parameters" or all(value == int(value) for value in values)):
        return f"{mean:,.0f}"
    if key == "parameters" or abs(mean) >= 1000:
        places = 0
    elif key in MEASURED or abs(mean) >= 100:
        places = 1
    else:
        places = 4 if abs(mean) < 10 else 2
    return f"{mean:,.{places}f}" if deviation is None else f"{mean:,.{places}f} ± {deviation:,.{places}f}"


def value_text(value: Any) -> str:
    """A recipe's value as YAML would have it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def pair_sentences(pair: Pair, comparison: Comparison) -> Iterator[str]:
    """A heading and what is known of a group next to the first."""
    which = f"{pair.second} beside {pair.first} ({comparison.checkpoint} checkpoint, {comparison.weights} weights)"
    if pair.first_accuracy is None or pair.second_accuracy is None:
        yield f"{which}: not both have a test accuracy of a finished run"
    else:
        gain = points(pair.second_accuracy - pair.first_accuracy)
        yield f"{which}: test accuracy {pair.first_accuracy:.2%} → {pair.second_accuracy:.2%}, {gain} points"
    many = len(comparison.pairs) > 1
    if pair.images is not None:
        over = f"over {pair.images.count:,} test images, each compared with itself"
        yield _estimate(over, pair.images, pair.images_p_adjusted if many else None)
    else:
        yield f"over test images: cannot be paired, since {pair.refusal}; the figures above are unpaired"
    unlike = ", on other test images" if pair.other_images else ""
    over = f"over seeds ({pair.counts[0]} and {pair.counts[1]} runs{unlike})"
    if pair.seeds is not None and pair.seeds.p_value is not None:
        yield _estimate(over, pair.seeds, pair.seeds_p_adjusted if many else None)
    elif pair.seeds is not None:
        why = "it takes two runs in each group" if min(pair.counts) < 2 else "the runs of a group do not differ"
        yield f"{over}: not tested, {why}"


def _estimate(over: str, found: Estimate, adjusted: float | None) -> str:
    decides = found.p_value if adjusted is None else adjusted
    verdict = "significant" if decides is not None and decides < LEVEL else "not significant"
    holm = "" if adjusted is None else f", {p_text(adjusted)} by Holm's correction"
    return (
        f"{over}: {points(found.difference)} points, 95% interval {interval_text(found)}, "
        f"{p_text(found.p_value)} ({found.method}){holm}: {verdict} at the {LEVEL:.0%} level"
    )


def interval_text(found: Estimate) -> str:
    """In percentage points."""
    return NO_VALUE if found.low is None or found.high is None else f"{points(found.low)} to {points(found.high)}"


def p_text(p_value: float | None) -> str:
    """A p-value to two digits."""
    if p_value is None:
        return NO_VALUE
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{round(100 * share, 2) + 0.0:+.2f}".replace("-", "−")  # + 0.0: no negative zero


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _wrapped(text: str, columns: int, indent: str = "", further: str = "  ") -> str:
    together = re.sub(r"\bp ([<=]) ", "p\u00a0\\1\u00a0", text)  # a p-value is not torn apart
    more = indent + further
    filled = textwrap.fill(together, columns, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False)
    return filled.replace("\u00a0", " ")


def _tables(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int) -> str:
    """A table; groups that have no room next to the others come in a further one below."""
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    blocks: list[list[int]] = [[0]]
    for i in range(1, len(header)):
        if len(blocks[-1]) > 1 and sum(widths[j] + 2 for j in [*blocks[-1], i]) - 2 > columns:
            blocks.append([0])
        blocks[-1].append(i)
    return "\n\n".join(
        "\n".join("  ".join(row[i].ljust(widths[i]) for i in block).rstrip() for row in [header, *rows])
        for block in blocks
    )


# --- the page


def comparison_page(comparison: Comparison) -> str:
    """The whole page, one HTML document that needs no other file."""
    spread = f"{what_the_spread_is(comparison).capitalize()}."
    sections = [
        page.Section("groups", "Groups"),
        page.Section("differences", "Differences of the recipes"),
        page.Section("figures", "Figures", lead=spread),
        page.Section("significance", "Beyond chance?", lead=WHAT_EACH_SAYS),
        page.Section("curves", "Curves", lead="A colour a group; dashes tell its runs apart."),
    ]
    groups = comparison.groups
    words = "All runs are of one recipe." if len(groups) == 1 else UNKNOWN_DIFFERENCES
    return page.page(
        f"Comparison: {', '.join(dict.fromkeys(group.name for group in groups))}",
        [section for section in sections if comparison.pairs or section.id != "significance"],
        subtitle=f"{_counted(sum(len(g.runs) for g in groups), 'run')} in {_counted(len(groups), 'group')}",
        notes=comparison.notes,
        template="comparison.html",
        groups=[(charts.swatch(i), *both) for i, both in enumerate(zip(group_lines(comparison), groups, strict=True))],
        letters=[group.letter for group in groups],
        differences=[[key, *map(value_text, values.values())] for key, values in comparison.differences.items()],
        no_differences=words,
        figures=figure_rows(comparison),
        pairs=[list(pair_sentences(pair, comparison)) for pair in comparison.pairs],
        tests=[row for pair in comparison.pairs for row in _test_rows(pair)],
        charts=_curves(comparison),
    )


def _test_rows(pair: Pair) -> Iterator[list[str]]:
    both = (("test images", pair.images, pair.images_p_adjusted), ("seeds", pair.seeds, pair.seeds_p_adjusted))
    for over, found, adjusted in both:
        cells = [NO_VALUE] * 5
        if found is not None:
            p_values = [p_text(found.p_value), p_text(adjusted)]
            cells = [points(found.difference), interval_text(found), *p_values, found.method]
        yield [f"{pair.second} − {pair.first}", over, *cells]


def _curves(comparison: Comparison) -> list[Markup]:
    drawn = []
    for title, key, split, y_label in _CHARTS:
        series = []
        for number, group in enumerate(comparison.groups):
            for place, run in enumerate(group.runs):
                points = run.curve(split, key, kind="step" if key == "lr" else "epoch")
                seed = run.setting("seed")
                name = f"{group.letter}, {run.run_id if seed is None else f'seed {seed}'}"
                # One colour for a group, and dashes for its runs; eight styles on, the colour is the same.
                style = number % charts.COLOURS + charts.COLOURS * place
                if points:
                    series.append(charts.Series(name, [p.epoch for p in points], [p.value for p in points], style))
        if series:
            words = f"{title} of {_counted(len(series), 'run')} by epoch."
            axes: dict[str, Any] = {"x_label": "epoch", "y_label": y_label, "as_percent": key == "accuracy"}
            drawn.append(charts.line_chart(series, title=title, description=words, **axes))
    return drawn
