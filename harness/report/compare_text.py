"""A comparison as text for a terminal; its sentences are those of the page too."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from harness.report.compare import Comparison, Figure, Pair
from harness.report.significance import Estimate, mean_and_deviation

LEVEL = 0.05
NO_VALUE = "-"
PLAIN_WIDTH = 100  # where there is no terminal
WHAT_EACH_SAYS = (
    "Over test images: whether these trained networks would differ on other images of the kind too. Over seeds: "
    "whether other trainings would differ on these images too. What only the images tell may be the luck of the seeds."
)
UNKNOWN_DIFFERENCES = "What these recipes differ in is not known, since not all of them can be read."
_LONGEST_VALUE = 28


def render(comparison: Comparison, *, width: int | None) -> str:
    """The whole comparison, for a terminal of so many columns; None where there is none."""
    columns = max(40, width or PLAIN_WIDTH)
    letters = [group.letter for group in comparison.groups]
    parts = ["\n".join(_wrapped(line, columns) for line in group_lines(comparison))]
    if comparison.differences:
        rows = [[key, *map(_shortened, values)] for key, values in comparison.differences.items()]
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
        known = [str(run.seed) for run in group.runs if run.seed is not None]
        seeds = ", ".join(sorted(known, key=lambda seed: (len(seed), seed)))  # as numbers are
        words = f", seed{'s' if len(known) != 1 else ''} {seeds}" if known else ""
        yield f"{group.letter}  {group.name}: {len(group.runs)} run{'s' if len(group.runs) != 1 else ''}{words}"


def what_the_spread_is(comparison: Comparison) -> str:
    """What ± means, with the number of runs."""
    counts = {len(group.runs) for group in comparison.groups}
    if counts == {1}:
        return "a run each"
    over = "mean ± sample standard deviation over the runs of a group"
    if len(counts) > 1:
        return f"{over}, n differs, see above"
    (n,) = counts
    fewer = any(0 < len(values) < n for figure in comparison.figures for values in figure.values.values())
    return f"{over}, n = {n}{' unless it is told' if fewer else ''}"


def figure_rows(comparison: Comparison) -> list[list[str]]:
    """The headline figures as rows of a table; with n where not all runs of a group have the figure."""
    rows = []
    for figure in comparison.figures:
        row = [figure.title]
        for group in comparison.groups:
            n = len(figure.values[group.letter])
            row.append(spread_text(figure, group.letter) + (f" (n = {n})" if 0 < n < len(group.runs) else ""))
        rows.append(row)
    return rows


def spread_text(figure: Figure, letter: str) -> str:
    """Mean ± sample standard deviation of a group."""
    values = figure.values[letter]
    if not values:
        return NO_VALUE
    mean, deviation = mean_and_deviation(values)
    if figure.kind == "share":
        return f"{mean:.2%}" if deviation is None else f"{100 * mean:.2f} ± {100 * deviation:.2f}%"
    if not deviation and (figure.kind == "count" or all(value == int(value) for value in values)):
        return f"{mean:,.0f}"
    if figure.kind == "count" or abs(mean) >= 1000:
        places = 0
    elif figure.kind == "measured" or abs(mean) >= 100:
        places = 1
    else:
        places = 4 if abs(mean) < 10 else 2
    return f"{mean:,.{places}f}" if deviation is None else f"{mean:,.{places}f} ± {deviation:,.{places}f}"


def value_text(value: Any) -> str:
    """A recipe's value as YAML would have it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def pair_sentences(pair: Pair, comparison: Comparison) -> Iterator[str]:
    """A heading and what is known of a group next to the first."""
    which = f"{comparison.checkpoint} checkpoint, {comparison.weights} weights"
    if pair.first_accuracy is None or pair.second_accuracy is None:
        yield f"{pair.second} beside {pair.first} ({which}): not both have a test accuracy of a finished run"
    else:
        gain = points(pair.second_accuracy - pair.first_accuracy)
        shares = f"{pair.first_accuracy:.2%} → {pair.second_accuracy:.2%}"
        yield f"{pair.second} beside {pair.first} ({which}): test accuracy {shares}, {gain} points"
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
    assert found.p_value is not None
    decides = found.p_value if adjusted is None else adjusted
    verdict = "significant" if decides < LEVEL else "not significant"
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


def _shortened(value: Any) -> str:
    text = value_text(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


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
