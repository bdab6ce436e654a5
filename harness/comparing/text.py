"""A comparison as text for a terminal; its sentences are those of the page too."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from harness.comparing.comparison import Comparison, Pair
from harness.comparing.groups import Figure
from harness.comparing.significance import Estimate, mean_and_deviation

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
    """The whole comparison.

    Args:
        width: columns of the terminal; None where there is none.
    """
    columns = max(40, width or PLAIN_WIDTH)
    letters = [group.letter for group in comparison.groups]
    parts = ["\n".join(_wrapped(line, columns) for line in group_lines(comparison))]
    if comparison.differences:
        rows = [[key, *map(value_text, values)] for key, values in comparison.differences.items()]
        parts.append(_tables(["recipe", *letters], rows, columns))
    elif len(letters) > 1:
        parts.append(_wrapped(UNKNOWN_DIFFERENCES, columns))
    rows = figure_rows(comparison)
    if rows:
        below = _wrapped(f"({what_the_spread_is(comparison)})", columns, further="")
        parts.append(f"{_tables(['figure', *letters], rows, columns)}\n{below}")
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
        known = [seed for seed in group.seeds if seed is not None]
        seeds = [str(seed) for seed in sorted(known, key=lambda seed: (len(str(seed)), str(seed)))]  # as numbers are
        count = f"{len(group.runs)} run{'s' if len(group.runs) != 1 else ''}"
        told = f", seed{'s' if len(seeds) != 1 else ''} {', '.join(seeds)}" if seeds else ""
        yield f"{group.letter}  {group.name}: {count}{told}"


def what_the_spread_is(comparison: Comparison) -> str:
    """What stands behind ±, with the number of runs."""
    counts = {len(group.runs) for group in comparison.groups}
    if counts == {1}:
        return "a run each"
    over = "mean ± sample standard deviation over the runs of a group"
    if len(counts) > 1:
        return f"{over}, n differs, see above"
    fewer = any(
        0 < len(figure.values[group.letter]) < len(group.runs)
        for figure in comparison.figures
        for group in comparison.groups
    )
    unless = " unless it is told" if fewer else ""
    return f"{over}, n = {counts.pop()}{unless}"


def figure_rows(comparison: Comparison) -> list[list[str]]:
    """The headline figures as rows of a table; with n where not all runs of a group have the figure."""
    return [
        [figure.title, *(_with_n(figure, group.letter, len(group.runs)) for group in comparison.groups)]
        for figure in comparison.figures
    ]


def _with_n(figure: Figure, letter: str, runs: int) -> str:
    n = len(figure.values[letter])
    return f"{spread_text(figure, letter)} (n = {n})" if 0 < n < runs else spread_text(figure, letter)


def spread_text(figure: Figure, letter: str) -> str:
    """Mean ± sample standard deviation of a group."""
    values = figure.values[letter]
    if not values:
        return NO_VALUE
    mean, deviation = mean_and_deviation(values)
    if figure.kind == "share":
        return f"{mean:.2%}" if deviation is None else f"{100 * mean:.2f} ± {100 * deviation:.2f}%"
    if figure.kind == "count":
        return f"{mean:,.0f}" if not deviation else f"{mean:,.0f} ± {deviation:,.0f}"
    places = 0 if abs(mean) >= 1000 else 1 if abs(mean) >= 100 or figure.kind == "measured" else 2
    places = 4 if abs(mean) < 10 and figure.kind == "number" else places
    if all(value == int(value) for value in values) and not deviation:
        return f"{mean:,.0f}"
    return f"{mean:,.{places}f}" if deviation is None else f"{mean:,.{places}f} ± {deviation:,.{places}f}"


def value_text(value: Any, *, whole: bool = False) -> str:
    """A recipe's value as YAML would have it; where it is long, cut unless it is wanted whole."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if whole or len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def pair_sentences(pair: Pair, comparison: Comparison) -> Iterator[str]:
    """A heading and what is known of a group beside the first."""
    which = f"{comparison.checkpoint} checkpoint, {comparison.weights} weights"
    if pair.first_accuracy is None or pair.second_accuracy is None:
        yield f"{pair.second} beside {pair.first} ({which}): not both have a test accuracy of a finished run"
    else:
        gain = points(pair.second_accuracy - pair.first_accuracy)
        shares = f"{pair.first_accuracy:.2%} → {pair.second_accuracy:.2%}"
        yield f"{pair.second} beside {pair.first} ({which}): test accuracy {shares}, {gain} points"
    many = len(comparison.pairs) > 1
    if pair.images is not None:
        count = f"{pair.images.count:,} test images, each compared with itself"
        yield _estimate(f"over {count}", pair.images, pair.images_p_adjusted if many else None)
    else:
        yield f"over test images: cannot be paired, since {pair.refusal}; the figures above are unpaired"
    unlike = ", on other test images" if pair.other_images else ""
    seeds = f"over seeds ({pair.counts[0]} and {pair.counts[1]} runs{unlike})"
    if pair.seeds is not None and pair.seeds.p_value is not None:
        yield _estimate(seeds, pair.seeds, pair.seeds_p_adjusted if many else None)
    elif pair.seeds is not None:
        why = "it takes two runs in each group" if min(pair.counts) < 2 else "the runs of a group do not differ"
        yield f"{seeds}: not tested, {why}"


def _estimate(over: str, found: Estimate, adjusted: float | None) -> str:
    assert found.p_value is not None
    assert found.low is not None
    assert found.high is not None
    decides = found.p_value if adjusted is None else adjusted
    verdict = "significant" if decides < LEVEL else "not significant"
    holm = "" if adjusted is None else f", {p_text(adjusted)} by Holm's correction"
    return (
        f"{over}: {points(found.difference)} points, 95% interval {points(found.low)} to {points(found.high)}, "
        f"{p_text(found.p_value)} ({found.method}){holm}: {verdict} at the {LEVEL:.0%} level"
    )


def p_text(p_value: float) -> str:
    """A p-value to two digits."""
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{round(100 * share, 2) + 0.0:+.2f}".replace("-", "−")  # + 0.0: no negative zero


def _wrapped(text: str, columns: int, indent: str = "", further: str | None = None) -> str:
    together = re.sub(r"\bp ([<=]) ", "p\u00a0\\1\u00a0", text)  # a p-value is not torn apart
    filled = textwrap.fill(
        together,
        columns,
        initial_indent=indent,
        subsequent_indent=indent + "  " if further is None else further,
        break_on_hyphens=False,
    )
    return filled.replace("\u00a0", " ")


def _tables(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int) -> str:
    """A table; groups that have no room beside the others come in a further one below."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(header)):
        if blocks[-1] and widths[0] + sum(widths[j] + 2 for j in [*blocks[-1], i]) > columns:
            blocks.append([])
        blocks[-1].append(i)
    return "\n\n".join(
        "\n".join("  ".join(row[i].ljust(widths[i]) for i in [0, *block]).rstrip() for row in [header, *rows])
        for block in blocks
    )
