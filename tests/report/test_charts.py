"""Charts: what is drawn is there, nothing is lost by thinning, names stay text, colours can be told apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report import page
from harness.report.axes import fit_axis, log_ticks, number, percent, thin, ticks, written
from harness.report.charts import COLOURS, DASHES, Series, bar_chart, heat_map, line_chart, shortened, stroke

STYLE = (Path(page.__file__).parent / "templates" / "style.css").read_text()


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(chart).iter("polyline")
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in lines]  # type: ignore[misc]


def test_thinning_keeps_the_ends_and_the_extremes_of_each_stretch() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(100_000.0), rng.normal(size=100_000)
    y[[31_234, 77_777]] = 50, -60
    kept_x, kept_y = thin(x, y, buckets=300)
    assert len(kept_x) <= 1200
    assert {31_234, 77_777, 0, 99_999} <= set(kept_x.astype(int).tolist())
    assert (np.diff(kept_x) > 0).all()
    np.testing.assert_array_equal(kept_y, y[kept_x.astype(int)])
    bucket = (x / x[-1] * 300).astype(int).clip(max=299)
    for m in (0, 17, 299):
        inside = (kept_x / x[-1] * 300).astype(int).clip(max=299) == m
        assert kept_y[inside].min() == y[bucket == m].min()
        assert kept_y[inside].max() == y[bucket == m].max()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 20))
def test_thinning_any_curve(values: list[float], buckets: int) -> None:
    y = np.array(values)
    x = np.sort(np.abs(y))  # several points at one x, and stretches without a point
    kept_x, kept_y = thin(x, y, buckets=buckets)
    assert 1 <= len(kept_x) <= max(len(x), 4 * buckets)
    assert (kept_y.min(), kept_y.max()) == (y.min(), y.max())
    assert (kept_x[0], kept_x[-1]) == (x[0], x[-1])


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, length: float) -> None:
    axis = fit_axis([low, low + length], 0, 100)
    found = axis.ticks()
    assert len(found) <= 12
    assert all(axis.low - 1e-6 * length <= tick <= axis.high + 1e-6 * length for tick in found)


def test_ticks() -> None:
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
    texts = written(ticks(low, high), write)
    assert len(set(texts)) == len(texts) >= 2
    assert all(any(float(text.strip("%kM").replace(",", "")) == pytest.approx(tick / unit, rel=1e-12)
                   for unit in (1, 0.01, 1e3, 1e6)) for text, tick in zip(texts, ticks(low, high), strict=True)
               )  # fmt: skip
    chart = line_chart([Series("a", [0, 1], [low, high])], title="T", description="", x_label="x",
                       as_percent=write is percent)  # fmt: skip
    shown = re.findall(r'<text class="end"[^>]*>([^<]*)<', chart)
    assert len(set(shown)) == len(shown) >= 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (0, "0"), (1500, "1,500"), (20_000, "20k"), (1.5e6, "1.5M"), (1e-5, "1e-05"), (-3e9, "-3G")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_are_short_and_all_but_all_is_not_all() -> None:
    texts = ["0%", "<0.01%", "7.12%", "50%", "99.9%", ">99.9%", ">99.9%", "100%"]
    assert [percent(p) for p in (0, 1e-6, 0.0712, 0.5, 0.999, 0.9997, 0.999999, 1)] == texts


def test_points_lie_where_their_values_are() -> None:
    x, y = [0, 10, 20, 30], [0.0, 1.0, 0.5, math.nan]
    ((first, middle, last),) = points_of(line_chart([Series("a", x, y)], title="T", description="D.", x_label="step"))
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert middle[1] < last[1] < first[1]  # up is less
    assert last[1] == pytest.approx((first[1] + middle[1]) / 2, abs=0.1)
    x, y = [0, 1, 2, 3], [0.001, 0.1, 10, 0]  # equal steps of a logarithmic axis are equal factors; 0 has no place
    ((a, b, c),) = points_of(line_chart([Series("a", x, y)], title="T", description="", x_label="x", log_y=True))
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.11)


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    def chart(*series: Series) -> str:
        return line_chart(series, title="T", description="", x_label="x")

    values = [1.0, math.nan, math.inf, -math.inf, 1e308, 2.0]
    (points,) = points_of(chart(Series("a", range(6), values)))
    assert len(points) == 2
    assert "No values that can be drawn" in chart(Series("a", [0], [math.nan]))
    assert "No values yet" in chart()
    for constant in ([0.0], [3.0, 3.0], [-2.0, -2.0]):
        assert not re.search("nan|inf", chart(Series("a", range(len(constant)), constant)))


def test_bars_are_as_long_as_their_values() -> None:
    chart = bar_chart(["a", "b", "c"], [0.5, 1.0, 0.0], title="T", description="")
    widths = [float(bar.attrib["width"]) for bar in ElementTree.fromstring(chart).iter("rect")]
    assert widths == [pytest.approx(widths[1] / 2, abs=0.1), widths[1], 0]


def test_no_axis_goes_where_no_value_can_be() -> None:
    """A run that is all right, or whose loss is 0, has no 105 % and no loss below 0."""

    def marks(values: list[float], *, as_percent: bool) -> list[str | None]:
        chart = line_chart([Series("a", [1, 2], values)], title="T", description="", x_label="x", as_percent=as_percent)
        return [text.text for text in ElementTree.fromstring(chart).iter("text") if text.attrib["class"] == "end"]

    assert marks([1.0, 1.0], as_percent=True)[-1] == "100%"
    assert marks([0.5, 1.0], as_percent=True)[-1] == "100%"
    assert marks([0.5, 1.5], as_percent=True)[-1] == "150%"  # it is drawn all the same
    assert marks([0.0, 0.0], as_percent=False)[0] == "0"


@pytest.mark.parametrize(("x", "marks"), [([1, 2], ["1", "2"]), ([4, 8], list("45678")), ([0.5, 1], None)], ids=str)
def test_there_is_no_half_a_step(x: list[float], marks: list[str] | None) -> None:
    chart = line_chart([Series("a", x, [0, 1])], title="T", description="", x_label="step")
    found = [text.text for text in ElementTree.fromstring(chart).iter("text") if text.attrib["class"] == "middle"]
    assert found == marks if marks else "0.6" in found


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("", ""),
        ("automobile", "automobile"),
        ("class number 7", "class num…"),
        ("WWWWWWWWWWW", "WWWWWW…"),
        ("虎" * 9, "虎虎虎虎虎…"),
    ],
)
def test_names_are_cut_by_their_width(text: str, short: str) -> None:
    assert shortened(text, 11) == short


def test_text_stays_text_and_charts_have_words() -> None:
    bad = '<script>alert("1")</script>'
    charts = [
        line_chart([Series(bad, [0, 1], [0, 1]), Series("b", [0], [1])], title=bad, description=bad, x_label=bad),
        bar_chart([bad, "b"], [1, 0.5], title=bad, description=bad),
        heat_map(np.eye(2), [bad, "b"], [bad, "b"], title=bad, description=bad, row_label=bad, column_label=bad,
                 texts=[[bad, ""], ["", "1"]]),
    ]  # fmt: skip
    for chart in charts:
        assert "<script" not in chart
        root = ElementTree.fromstring(chart)  # well-formed, so nothing broke out of an attribute
        svg = root.find("svg")
        assert svg is not None
        assert svg.attrib["role"] == "img"
        assert svg.find("title").text == bad  # type: ignore[union-attr]
        assert svg.find("desc").text.startswith(bad)  # type: ignore[union-attr]


def test_cells_are_fuller_for_larger_values_and_empty_for_none() -> None:
    values = np.array([[0.0, 0.5], [1.0, 0.1]])
    chart = heat_map(
        values,
        "ab",
        "cd",
        title="T",
        description="",
        row_label="r",
        column_label="c",
        texts=[["0", "0.5"], ["1", "0.1"]],
    )
    cells = {cell.find("title").text: float(cell.attrib["fill-opacity"])  # type: ignore[union-attr]
             for cell in ElementTree.fromstring(chart).iter("rect") if cell.attrib["class"] == "cell"}  # fmt: skip
    assert cells["a → d: 0.5"] < cells["b → c: 1"]
    assert len(cells) == 3


# --- colours


def colours(scheme: str, name: str = r"series-\d") -> list[tuple[float, ...]]:
    """RGB from 0 to 1 as the style sheet has them, by the order of their names."""
    light, dark = STYLE.split("prefers-color-scheme: dark", 1)
    text = light if scheme == "light" else dark.split("}", 1)[0]
    found = dict(re.findall(rf"--({name}): #(\w{{6}})", text))
    return [tuple(int(found[key][i : i + 2], 16) / 255 for i in (0, 2, 4)) for key in sorted(found)]


def linear(colour: tuple[float, ...]) -> np.ndarray:
    c = np.array(colour)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Of WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113, severity 1, on linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopes": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
}  # fmt: skip


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_text_stand_out_from_the_page(scheme: str) -> None:
    series = colours(scheme)
    assert len(series) == COLOURS
    for ground in colours(scheme, "page") + colours(scheme, "card"):
        assert min(contrast(colour, ground) for colour in series) >= 3  # WCAG 1.4.11, graphical objects
        for name in ("text", "muted", "accent", "warn"):
            assert contrast(colours(scheme, name)[0], ground) >= 4.5  # WCAG 1.4.3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_cells_can_be_read(scheme: str) -> None:
    values = np.linspace(0.0, 1.0, 100).reshape(10, 10)
    names = [str(i) for i in range(10)]
    texts = [["36"] * 10] * 10
    chart = heat_map(values, names, names, title="T", description="", row_label="r", column_label="c", texts=texts)
    found = list(ElementTree.fromstring(chart).iter())
    kinds = [e.attrib["class"] for e in found if e.attrib.get("class", "").startswith("cell-text")]
    shares = [float(e.attrib["fill-opacity"]) for e in found if e.attrib.get("class") == "cell"]
    assert len(kinds) == len(shares) == 99
    ground, full = (np.array(colours(scheme, name)[0]) for name in ("card", "series-0"))
    for kind, share in zip(kinds, shares, strict=True):
        letters = colours(scheme, "page" if kind.endswith(" on") else "text")[0]
        assert contrast(tuple(share * full + (1 - share) * ground), letters) >= 4.5, share


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("eyes", SEEN_BY)
def test_series_are_told_apart(scheme: str, eyes: str) -> None:
    """Any two by colour (CIE 1976 difference) or, where these are near, by their dashes; the first four by both."""
    seen = [lab(SEEN_BY[eyes] @ linear(colour)) for colour in colours(scheme)]
    for i, j in combinations(range(COLOURS), 2):
        distance = float(np.linalg.norm(seen[i] - seen[j]))
        same_dashes = DASHES[i % len(DASHES)] == DASHES[j % len(DASHES)]
        assert distance > (12 if same_dashes else 4), (i, j, distance)
        assert j >= 4 or distance > 12, (i, j, distance)
    assert len({stroke(style) for style in range(COLOURS * len(DASHES))}) == COLOURS * len(DASHES)
