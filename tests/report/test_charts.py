"""Charts: what is drawn is there, nothing is lost by thinning, names stay text, colours can be told apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report import page
from harness.report.charts import (
    COLOURS,
    DASHES,
    Axis,
    Series,
    bar_chart,
    epoch_text,
    fit_axis,
    line_chart,
    log_ticks,
    number,
    percent,
    shortened,
    stroke,
    thin,
    ticks,
)
from harness.report.explain import confusion_chart

STYLE = (Path(page.__file__).parent / "templates" / "style.css").read_text()


def chart(x: list[float], y: list[float], **options: bool) -> ElementTree.Element:
    drawn = line_chart([Series("a", x, y)], title="T", description="", x_label="x", **options)
    return ElementTree.fromstring(drawn)


def points_of(drawn: ElementTree.Element) -> list[list[float]]:
    (line,) = drawn.iter("polyline")
    return [list(map(float, point.split(","))) for point in line.attrib["points"].split()]


def texts_of(drawn: ElementTree.Element, kind: str) -> list[str | None]:
    return [text.text for text in drawn.iter("text") if text.attrib.get("class") == kind]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 20))
def test_thinning_keeps_the_ends_and_the_extremes_of_each_stretch(values: list[float], buckets: int) -> None:
    y = np.array(values)
    x = np.sort(np.abs(y))  # several points at one x, and stretches without a point
    kept_x, kept_y = thin(x, y, buckets=buckets)
    assert 1 <= len(kept_x) <= max(len(x), 4 * buckets)
    span = float(x[-1] - x[0]) or 1.0
    all_of, kept_of = (((v - x[0]) / span * buckets).astype(int).clip(max=buckets - 1) for v in (x, kept_x))
    for bucket in set(all_of.tolist()):
        inside, kept = y[all_of == bucket], kept_y[kept_of == bucket]
        assert (kept[0], kept.min(), kept.max(), kept[-1]) == (inside[0], inside.min(), inside.max(), inside[-1])


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low: float, length: float) -> None:
    axis = fit_axis(np.array([low, low + length]), 0, 100)
    found = ticks(axis.low, axis.high)
    assert len(found) <= 12
    assert all(axis.low - 1e-6 * length <= tick <= axis.high + 1e-6 * length for tick in found)


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.31, 2.3) == [0.5, 1, 1.5, 2]
    assert log_ticks(1e-4, 1) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])
    assert log_ticks(0.15, 3) == pytest.approx([0.2, 0.5, 1, 2])


@pytest.mark.parametrize(
    ("low", "high", "write"),
    [(0.9990, 0.9999, percent), (1e-5, 8e-5, percent), (1_234_000, 1_235_000, number), (390_010, 390_100, number),
     (2.3025, 2.30262, number), (1234.1, 1234.9, number)],
)  # fmt: skip
def test_no_two_ticks_are_alike(low: float, high: float, write: Callable[..., str]) -> None:
    texts = [text for text, _ in Axis(low, high, 0, 100).written(write)]
    assert len(set(texts)) == len(texts) >= 2
    for text, tick in zip(texts, ticks(low, high), strict=True):
        value = float(text.strip("%kM").replace(",", ""))
        assert any(value == pytest.approx(tick / unit, rel=1e-12) for unit in (1, 0.01, 1e3, 1e6))


def test_numbers_are_short_and_all_but_all_is_not_all() -> None:
    numbers = {0.25: "0.25", 0: "0", 1500: "1,500", 20_000: "20k", 1.5e6: "1.5M", 1e-5: "1e-05", -3e9: "-3G"}
    assert [number(value) for value in numbers] == list(numbers.values())
    shares = {0: "0%", 1e-6: "<0.01%", 0.0712: "7.12%", 0.5: "50%", 0.999: "99.9%", 0.9997: ">99.9%", 1: "100%"}
    assert [percent(share) for share in shares] == list(shares.values())
    epochs = {0.1279: "0.1", 22.25: "22.2", 2: "2", 12345: "12345", 1e14: "1e+14"}
    assert [epoch_text(epoch) for epoch in epochs] == list(epochs.values())


def test_points_lie_where_their_values_are() -> None:
    first, middle, last = points_of(chart([0, 10, 20, 30], [0.0, 1.0, 0.5, math.nan]))
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert middle[1] < last[1] < first[1]  # up is less
    assert last[1] == pytest.approx((first[1] + middle[1]) / 2, abs=0.1)
    # Equal steps of a logarithmic axis are equal factors; 0 has no place.
    a, b, c = points_of(chart([0, 1, 2, 3], [0.001, 0.1, 10, 0], log_y=True))
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.11)


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    assert len(points_of(chart(list(range(6)), [1.0, math.nan, math.inf, -math.inf, 1e308, 2.0]))) == 2
    assert "No values that can be drawn" in "".join(chart([0], [math.nan]).itertext())
    assert "No values yet" in line_chart([], title="T", description="", x_label="x")
    for constant in ([0.0], [3.0, 3.0], [-2.0, -2.0]):
        assert not re.search("nan|inf", str(points_of(chart(list(range(len(constant))), constant))))


@pytest.mark.parametrize(
    ("values", "as_percent", "place", "mark"),
    [
        ([1.0, 1.0], True, -1, "100%"),  # nothing is beyond 100 %
        ([0.5, 1.0], True, -1, "100%"),
        ([0.5, 1.5], True, -1, "150%"),  # it is drawn all the same
        ([0.0, 0.0], False, 0, "0"),  # no loss is below 0
    ],
)
def test_no_axis_goes_where_no_value_can_be(values: list[float], as_percent: bool, place: int, mark: str) -> None:
    assert texts_of(chart([1, 2], values, as_percent=as_percent), "end")[place] == mark


@pytest.mark.parametrize(("x", "marks"), [([1, 2], ["1", "2"]), ([4, 8], list("45678")), ([0.5, 1], None)], ids=str)
def test_there_is_no_half_a_step(x: list[float], marks: list[str] | None) -> None:
    found = texts_of(chart(x, [0, 1]), "middle")
    assert found == marks if marks else "0.6" in found


@pytest.mark.parametrize(
    ("text", "short"),
    [("", ""), ("automobile", "automobile"), ("class number 7", "class num…"), ("W" * 11, "WWWWWW…"),
     ("虎" * 9, "虎虎虎虎虎…")],
)  # fmt: skip
def test_names_are_cut_by_their_width(text: str, short: str) -> None:
    assert shortened(text, 11) == short


def test_text_stays_text_and_charts_have_words() -> None:
    bad = '<script>alert("1")</script>'
    charts = [
        line_chart([Series(bad, [0, 1], [0, 1]), Series("b", [0], [1])], title=bad, description=bad, x_label=bad),
        bar_chart([bad, "b"], [1, 0.5], title=bad, description=bad),
        confusion_chart(np.eye(2, dtype=int), [bad, "b"]),
    ]
    for drawn in charts:
        assert "<script" not in drawn
        svg = ElementTree.fromstring(drawn).find("svg")  # well-formed, so nothing broke out of an attribute
        assert svg is not None
        assert svg.attrib["role"] == "img"
        assert svg.find("title").text in (bad, "Confusion matrix")  # type: ignore[union-attr]
        assert svg.find("desc").text  # type: ignore[union-attr]


def test_bars_are_as_long_and_cells_as_full_as_their_values() -> None:
    bars = ElementTree.fromstring(bar_chart(["a", "b", "c"], [0.5, 1.0, 0.0], title="T", description=""))
    widths = [float(bar.attrib["width"]) for bar in bars.iter("rect")]
    assert widths == [pytest.approx(widths[1] / 2, abs=0.1), widths[1], 0]
    matrix = ElementTree.fromstring(confusion_chart(np.array([[0, 5], [1, 9]]), ["a", "b"]))
    cells = [cell for cell in matrix.iter("rect") if cell.attrib["class"] == "cell"]
    full = {cell.find("title").text: float(cell.attrib["fill-opacity"]) for cell in cells}  # type: ignore[union-attr]
    assert list(full) == ["a → b: 5", "b → a: 1", "b → b: 9"]
    assert full["b → a: 1"] < full["b → b: 9"] < full["a → b: 5"]  # shares of the true class, the row


# --- colours


def colours(scheme: str, name: str = r"series-\d") -> list[np.ndarray]:
    """RGB from 0 to 1 as the style sheet has them, by the order of their names."""
    light, dark = STYLE.split("prefers-color-scheme: dark", 1)
    text = light if scheme == "light" else dark.split("}", 1)[0]
    found = dict(re.findall(rf"--({name}): #(\w{{6}})", text))
    return [np.frombuffer(bytes.fromhex(found[key]), np.uint8) / 255 for key in sorted(found)]


def linear(colour: np.ndarray) -> np.ndarray:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """Of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_text_stand_out_from_what_is_behind_them(scheme: str) -> None:
    series = colours(scheme)
    assert len(series) == COLOURS
    for ground in colours(scheme, "page") + colours(scheme, "card"):
        assert min(contrast(colour, ground) for colour in series) >= 3  # WCAG 1.4.11, graphical objects
        for name in ("text", "muted", "accent", "warn"):
            assert contrast(colours(scheme, name)[0], ground) >= 4.5  # WCAG 1.4.3
    cells = ElementTree.fromstring(confusion_chart(np.array([[1, 99], [100, 0]]), ["a", "b"])).iter("rect")
    shares = [float(cell.attrib["fill-opacity"]) for cell in cells if cell.attrib["class"] == "cell"]
    for share in np.linspace(min(shares), max(shares), 50):
        ground = share * series[0] + (1 - share) * colours(scheme, "card")[0]
        assert contrast(ground, colours(scheme, "text")[0]) >= 4.5, share


def test_forty_series_are_told_apart() -> None:
    assert len({stroke(style) for style in range(COLOURS * len(DASHES))}) == COLOURS * len(DASHES)
