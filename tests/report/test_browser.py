"""Pages in a real browser: nothing is asked of a network, no error, nothing wider than a phone, words for images."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from harness.cli import main
from harness.report.charts import Series, bar_chart, line_chart
from harness.report.explain import confusion_chart
from harness.report.page import Section, page, render
from harness.report.terminal import curve_page
from harness.training.lr_finder import LrRange, suggest
from tests.report.conftest import OpenPage
from tests.report.test_reporter import SECTIONS, grow

pytestmark = pytest.mark.browser

WIDER_THAN_THE_PAGE = """() => [...document.querySelectorAll('body *')].filter(e => {
    const inside = e.closest('.scroll, pre');
    return (!inside || inside === e) && e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => e.outerHTML.slice(0, 100))"""

# Letters of drawings that are cut off at their edge, or lie over others.
ILLEGIBLE = """() => [...document.querySelectorAll('figure.chart > svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
    const outside = texts.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1
        || b.top < frame.top - 1 || b.bottom > frame.bottom + 1);
    const over = texts.filter(([, a], i) => texts.some(([, b], j) => j > i
        && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3));
    return [...outside, ...over].map(([text]) => text);
})"""
SCROLL_WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pages") / "report.html"
    run = shutil.copytree(trained, file.parent / trained.name)
    assert main(["report", str(run), "--output", str(file)]) == 0
    return file


def page_of(folder: Path, **bodies: str) -> Path:
    file = folder / "page.html"
    file.write_text(page("T", [Section(id, id, Markup(body)) for id, body in bodies.items()]))
    return file


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (360, "light"), (1440, "dark"), (1440, "light")])
def test_a_report_in_a_browser(open_page: OpenPage, report: Path, width: int, scheme: str) -> None:
    page = open_page(report, width, scheme)
    assert (page.errors, page.requests) == ([], [report.as_uri()])
    assert [s.get_attribute("id") for s in page.query_selector_all("main > section")] == SECTIONS
    assert page.evaluate(SCROLL_WIDTH) <= width
    for folded in page.query_selector_all("summary"):
        folded.click()
    assert page.evaluate(SCROLL_WIDTH) <= width
    assert page.evaluate(WIDER_THAN_THE_PAGE) == []
    assert page.evaluate(ILLEGIBLE) == []
    images = page.query_selector_all("img")
    assert len(images) > 20
    assert all(image.get_attribute("alt") for image in images)
    for true in (
        "[...document.images].every(i => i.complete && i.naturalWidth > 0)",
        "[...document.querySelectorAll('table')].every(t => t.tHead && t.caption)",
        "[...document.querySelectorAll('svg:not([aria-hidden])')].every(s => s.ariaLabel || s.querySelector('title'))",
    ):
        assert page.evaluate(true), true
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 382) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 1440])
def test_all_letters_of_charts_can_be_read(open_page: OpenPage, tmp_path: Path, width: int) -> None:
    """Small rates, many classes, long names of wide letters; the rates of a range test, each on one line."""
    words = {"title": "T", "description": "", "x_label": "step", "y_label": "learning rate"}
    charts = [line_chart([Series("a", [1, 2], rates)], **words) for rates in ([0.0085, 0.0085], [1.0e-4, 1.4e-4])]
    names = ["class number 00123456", "WWWMMM Number 0123456789", "虎" * 20, "dog & “wolf”"]
    charts.append(bar_chart(names, [0.1, 0.2, 0.5, 1.0], title="T", description=""))
    for classes in (2, 10, 16, 20, 30):
        named = [names[k % len(names)] for k in range(classes)]
        charts.append(confusion_chart(np.eye(classes, dtype=int), named))
    grid = render("section_curves.html", charts=charts, why="", epochs=None)
    assert open_page(page_of(tmp_path, charts=grid), width).evaluate(ILLEGIBLE) == []
    lrs = np.geomspace(1e-4, 1.0, 40)
    losses = (2 - np.exp(-((np.log10(lrs) + 1) ** 2))).tolist()
    found = LrRange(lrs.tolist(), losses, losses, 1.0, suggest(lrs.tolist(), losses, diverged=True))
    assert all(suggestion.lr for suggestion in found.suggestions)
    (tmp_path / "lr.html").write_text(curve_page(found, "tiny"))
    page = open_page(tmp_path / "lr.html", width)
    assert page.locator("figure.chart").bounding_box()["width"] <= 700  # as on other pages
    assert page.evaluate(ILLEGIBLE) == []
    heights = [rate.bounding_box()["height"] for rate in page.locator("tbody .number").all()]
    assert len(heights) == 2
    assert max(heights) < 30


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_shows_on_which_side_there_is_more_of_it(open_page: OpenPage, tmp_path: Path, scheme: str) -> None:
    tables = {"header": ["Epoch"], "rows": [["\u00a0" * 160]] * 3, "caption": "Wide"}
    wide = render("section_curves.html", charts=[""], why="", epochs=tables)
    narrow = render("section_curves.html", charts=[""], why="", epochs=tables | {"rows": [["1"]] * 3})
    page = open_page(page_of(tmp_path, wide=wide, narrow=narrow), 360, scheme)
    for folded in page.query_selector_all("summary"):
        folded.click()

    def edges(place: int) -> list[bool]:
        """Whether the left and the right edge have another colour than the page, between two lines of letters."""
        region = page.locator(".scroll").nth(place)
        pixels = np.asarray(Image.open(io.BytesIO(region.screenshot())).convert("RGB"), int)
        page_colour = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), int)[1, 1]
        return [bool(np.abs(pixels[3, x] - page_colour).sum() > 60) for x in (0, -1)]

    assert edges(0) == [False, True]
    assert edges(1) == [False, False]
    page.locator(".scroll").first.evaluate("e => e.scrollLeft = 100")
    assert edges(0) == [True, True]
    page.locator(".scroll").first.evaluate("e => e.scrollLeft = 9999")
    assert edges(0) == [True, False]


def test_values_under_the_pointer_are_the_runs_own(open_page: OpenPage, report: Path, tmp_path: Path) -> None:
    """Not what a place in tenths of a pixel tells: epochs are whole, and small values stay beside large ones."""
    page = open_page(report)
    chart, values = page.locator("#curves svg[data-plot]").first, page.locator("#curves .values").first
    chart.scroll_into_view_if_needed()
    chart.hover(position={"x": 200, "y": 100})
    assert values.is_visible()
    assert re.search(r"^\d+\ntraining: [\d.]+\ntest: [\d.]+", values.inner_text())
    page.locator("h1").hover()
    assert not values.is_visible()
    assert page.errors == []
    page.get_by_role("link", name="Worst mistakes").click()
    assert page.evaluate("location.hash") == "#mistakes"
    losses = [900.0, *(0.3 + i / 1000 for i in range(99))]
    shares = [0.1, *([0.46239] * 99)]
    words = {"title": "T", "description": "", "x_label": "epoch"}
    a = line_chart([Series("test", range(1, 101), losses)], **words)
    b = line_chart([Series("test", range(1, 101), shares)], as_percent=True, **words)
    page = open_page(page_of(tmp_path, a=a, b=b))
    for section, last in (("a", "0.398"), ("b", "46.24%")):
        chart = page.locator(f"#{section} svg[data-plot]")
        found = {}
        for share in range(20, 96, 5):
            chart.hover(position={"x": chart.bounding_box()["width"] * share / 100, "y": 100})
            epoch, value = re.fullmatch(
                r"(\d+)\ntest: (\S+)", page.locator(f"#{section} .values").inner_text()
            ).groups()
            found[int(epoch)] = value
        assert found[100] == last
        if section == "a":
            assert {n: float(value) for n, value in found.items()} == pytest.approx(
                {n: losses[n - 1] for n in found}, rel=1e-4
            )


def test_without_scripts_all_is_there(open_page: OpenPage, report: Path) -> None:
    page = open_page(report, scripts=False)
    assert page.locator("main > section").count() == len(SECTIONS)
    assert page.locator("svg polyline").count() >= 6
    page.locator("summary", has_text="Recipe").click()
    assert page.locator("pre", has_text="name: digits").is_visible()


# --- --serve


@contextmanager
def served(run: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`harness report RUN --serve` as a process of its own, and its address."""
    command = [sys.executable, "-m", "harness", "report", str(run), "--serve", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + (process.communicate(timeout=30)[1] if process.poll() is not None else "")
        yield found.group(), process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_served_report_follows_its_run(open_page: OpenPage, run: Path) -> None:
    checkpoints = sorted((run / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    aside = run.parent / "aside"
    shutil.move(checkpoints[-1], aside)
    (run / "result.json").unlink()
    with served(run) as (url, process):
        page = open_page(url)
        page.wait_for_selector(f".badge:has-text('{checkpoints[0].name}')", timeout=60_000)
        page.locator("summary", has_text="Recipe").click()
        grow(run)
        page.wait_for_selector("#summary strong:has-text('98.76%')", timeout=60_000)
        assert page.locator("pre", has_text="name: digits").is_visible()  # what was folded out stays so
        shutil.move(aside, checkpoints[-1])
        page.wait_for_selector(f".badge:has-text('{checkpoints[-1].name}')", timeout=60_000)
        page.locator("#curves svg[data-plot]").first.hover(position={"x": 200, "y": 100})
        assert page.locator("#curves .values").first.is_visible()  # in a part that was put in again
        assert page.errors == []
        assert all(asked.startswith(url) for asked in page.requests)
        assert "98.76%" in (run / "report.html").read_text()
        assert "setInterval" not in (run / "report.html").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_the_server_answers_this_machine_alone(run: Path, free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with served(run, "--port", str(free_port)) as (url, process):
        assert url == f"http://127.0.0.1:{free_port}/"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            assert "<!doctype html>" in answer.read().decode()
        for path, headers, code in (
            ("", {"Host": "example.org"}, 403),  # a name that was made to lead to this machine
            ("metrics.jsonl", {}, 404),
            ("../recipe.yaml", {}, 404),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=30)
            assert refused.value.code == code
            refused.value.close()
        assert main(["report", str(run), "--serve", "--port", str(free_port)]) == 2
        assert f"port {free_port} cannot be used" in capsys.readouterr().err
        deadline = time.monotonic() + 60
        while not (run / "report.html").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
