"""Curves of runs as text: braille dots in the terminal's colours, or letters on lines where there are none.

plotille draws the dots and lines (pure Python, MIT, no dependencies); axes, legend and what is drawn are ours.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plotille import Canvas, color

from harness.errors import HarnessError, nearest
from harness.reporting.axes import Axis, fit_axis, number, percent, written
from harness.runs import Run, open_run

# What can be drawn: the key in metrics.jsonl, its title, and which splits have it.
_SPLITS = {"train": "train", "test": "test", "test_ema": "EMA"}
QUANTITIES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "loss": ("loss", "loss", tuple(_SPLITS)),
    "accuracy": ("accuracy", "accuracy", tuple(_SPLITS)),
    "lr": ("lr", "learning rate", ("train",)),
    "throughput": ("images_per_second", "images per second", ("train",)),
}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Of the 256 colours of terminals, legible on black and on white.
COLOURS = (33, 208, 34, 162, 99, 37, 160, 136)
HEIGHT_LINES = 14
MIN_WIDTH, MAX_WIDTH = 12, 110
_FEW = 3  # epochs up to which the steps of the training are drawn too
_DOTS_ACROSS, _DOTS_DOWN = 2, 4  # in a character
LARGEST = 1e300
_EMPTY = "\u2800"


@dataclass(frozen=True)
class Curve:
    """A named curve.

    Attributes:
        name: in the legend.
        x, y: of its points, in order; at least one.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


def has_colours() -> bool:
    """Whether standard output is a terminal that shows colours, and they are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def parse_what(text: str) -> tuple[str, ...]:
    """The quantities named in a list with commas, each once.

    Raises:
        HarnessError: one is not known.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in QUANTITIES:
            raise HarnessError(f'--what: "{name}" is not drawn', hint=nearest(name, QUANTITIES))
    if not names:
        raise HarnessError("--what names nothing", hint=f"Choose of {', '.join(QUANTITIES)}.")
    return names


def draw_runs(paths: Sequence[Path], what: Sequence[str], *, size: os.terminal_size, colours: bool) -> tuple[str, bool]:
    """Curves of runs, drawn over one another, and whether any of the runs still goes on.

    Args:
        paths: run directories.
        what: of `QUANTITIES`.
        size: of the terminal, columns and lines.
        colours: write colour codes; letters tell the curves apart otherwise, and where colours do not suffice. Without
            a terminal there are none anyhow.

    Raises:
        HarnessError: a path is no run.
    """
    runs = [open_run(path) for path in dict.fromkeys(paths)]
    told = [f"{run.label}: {_state(run)}" for run in runs]
    told += [f"  {problem}" for run in runs for problem in run.problems]
    for name in what:
        told += ["", draw(title_of(name), curves_of(runs, name), name, size=size, colours=colours)]
    return "\n".join(told), any(run.state == "running" for run in runs)


def watch(draw: Callable[[], tuple[str, bool]], *, seconds: float, clear: bool) -> None:
    """Print what `draw` returns, anew when it has changed, until it says that nothing goes on, or Ctrl-C.

    Args:
        draw: returns the text, and whether it may still change.
        seconds: between two looks.
        clear: clear the terminal before each picture.
    """
    before = None
    try:
        while True:
            text, goes_on = draw()
            if text != before:
                print(f"\x1b[H\x1b[2J{text}" if clear else text, flush=True)
                before = text
            if not goes_on:
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()


def title_of(name: str) -> str:
    return QUANTITIES[name][1]


def curves_of(runs: Sequence[Run], name: str) -> list[Curve]:
    """The curves of a quantity, by epochs; in a run's first epochs its training's steps instead."""
    key, _, splits = QUANTITIES[name]
    curves = []
    for run in runs:
        for split in splits:
            points = run.curve(split, key)
            if split == "train" and (len(points) < _FEW or key == "lr"):
                points = run.curve(split, key, kind="step") or points
            words = [run.run_id] if len(runs) > 1 else []
            words += [_SPLITS[split]] if len(splits) > 1 or not words else []
            if points:
                curves.append(Curve(" ".join(words), [p.epoch for p in points], [p.value for p in points]))
    return curves


def draw(
    title: str,
    curves: Sequence[Curve],
    name: str,
    *,
    size: os.terminal_size,
    colours: bool,
    x_label: str = "epoch",
    log_x: bool = False,
) -> str:
    """A chart with its title, axes and legend, no wider than the terminal."""
    if not curves:
        return f"{title}\n  no values yet"
    write = percent if name == "accuracy" else number
    exactly = "{:.2%}".format if name == "accuracy" else number
    values = np.concatenate([_values(curve) for curve in curves])
    places = np.concatenate([curve.x for curve in curves])
    height = max(4, min(HEIGHT_LINES, size.lines - 6)) if size.lines else HEIGHT_LINES
    y_axis = fit_axis(values, 0, height * _DOTS_DOWN - 1, most=1.0 if name == "accuracy" else None)
    labels = _labels(y_axis, height, write)
    margin = max(map(len, labels.values())) + 2
    width = max(MIN_WIDTH, min(MAX_WIDTH, size.columns - margin - 1))
    x_axis = fit_axis(places, 0, width * _DOTS_ACROSS - 1, log=log_x)
    lines = _canvas(curves, x_axis, y_axis, width, height, colours)
    drawn = [f"{labels.get(row, ''):>{margin - 2}} {'┤' if row in labels else '│'}{line}" for row, line in lines]
    marks = [_mark(i, colours, len(curves)) for i in range(len(curves))]
    legend = [_legend(mark, curve, exactly, x_label, size.columns) for mark, curve in zip(marks, curves, strict=True)]
    below = _below(x_axis, width, margin)
    return "\n".join([f"{title} by {x_label}", *(line.rstrip() for line in drawn), *below, *legend])


def _canvas(
    curves: Sequence[Curve], x_axis: Axis, y_axis: Axis, width: int, height: int, colours: bool
) -> list[tuple[int, str]]:
    """The rows of the drawing with their numbers, from the top; row 0 is the lowest."""
    canvas = Canvas(width, height, 0, 0, width * _DOTS_ACROSS, height * _DOTS_DOWN, mode="byte")
    placed = []
    for curve in curves:
        x = x_axis.place(np.array(curve.x)).round().astype(int).tolist()
        y = y_axis.place(_values(curve)).round().astype(int).tolist()
        placed.append(list(zip(x, y, strict=True)))
    for i, places in enumerate(placed):
        shade = COLOURS[i % len(COLOURS)] if colours else None
        canvas.point(*places[0], color=shade)
        for (x0, y0), (x1, y1) in itertools.pairwise(places):
            canvas.line(x0, y0, x1, y1, color=shade)
    if not colours or len(curves) > len(COLOURS):
        for i, places in enumerate(placed):
            for x, y in _spread(places, width * _DOTS_ACROSS // 6):
                shade = COLOURS[i % len(COLOURS)] if colours else None
                canvas.point(x, y, color=shade, marker=LETTERS[i % len(LETTERS)])
    text = canvas.plot(linesep="\n").replace(_EMPTY, " ")
    return [(height - 1 - i, line) for i, line in enumerate(text.split("\n"))]


def _values(curve: Curve) -> np.ndarray:
    """The values of a curve, (points,) float64, within what leaves their differences finite."""
    return np.clip(curve.y, -LARGEST, LARGEST)


def _spread(places: Sequence[tuple[int, int]], apart: int) -> list[tuple[int, int]]:
    """Some of a curve's places for its letter: the last one, and others at least so many dots apart."""
    chosen = [places[-1]]
    for place in reversed(places):
        if chosen[-1][0] - place[0] >= apart:
            chosen.append(place)
    return chosen


def _labels(axis: Axis, height: int, write: Callable[..., str]) -> dict[int, str]:
    """What is written beside which row."""
    ticks = axis.ticks(max(3, height // 2))
    rows = (axis.place(np.array(ticks)) / _DOTS_DOWN).astype(int).tolist()
    return {row: text for row, text in zip(rows, written(ticks, write), strict=True) if 0 <= row < height}


def _below(axis: Axis, width: int, margin: int) -> list[str]:
    """The axis of the epochs: a line with marks, and numbers below it that do not touch."""
    line, numbers = ["─"] * width, ""
    ticks = axis.ticks(max(2, width // 12))
    for tick, text in zip(ticks, written(ticks, number), strict=True):
        column = int(axis.place(np.array([tick]))[0] / _DOTS_ACROSS)
        start = max(0, min(column - len(text) // 2, width - len(text)))
        line[column] = "┬"
        if not numbers or start >= len(numbers) + 2:
            numbers = numbers.ljust(start) + text
    return [" " * (margin - 1) + "└" + "".join(line), " " * margin + numbers]


def _mark(index: int, colours: bool, curves: int) -> str:
    """What a curve is known by: its colour, or its letter; both where there are more curves than colours."""
    letter = LETTERS[index % len(LETTERS)]
    if not colours:
        return letter
    line = "⠤⠤" if curves <= len(COLOURS) else f"⠤{letter}"
    return str(color(line, fg=COLOURS[index % len(COLOURS)], mode="byte"))


def _legend(mark: str, curve: Curve, write: Callable[[float], str], x_label: str, columns: int) -> str:
    told = f"{write(curve.y[-1])} at {x_label} {number(curve.x[-1])}"
    room = max(6, columns - len(told) - 7)
    name = curve.name if len(curve.name) <= room else "…" + curve.name[1 - room :]
    return f"  {mark} {name}: {told}"


def _state(run: Run) -> str:
    return f"{run.state}, epoch {number(run.epoch)}" if run.records else f"{run.state}, no records yet"
