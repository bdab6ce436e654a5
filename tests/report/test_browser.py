"""Pages in a real browser: nothing is asked of a network, no error, nothing wider than a phone, words for images."""

from __future__ import annotations

import io
import json
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
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.cli import main
from harness.report.charts import Series, bar_chart, heat_map, line_chart
from harness.report.lr_curve import curve_page
from harness.report.page import Section, grid, table
from harness.report.page import page as page_of
from harness.training.lr_finder import LrRange, suggest
from tests.report.test_report import SECTIONS

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


class Watched:
    """A page with all that went wrong in it and all that it asked for."""

    def __init__(self, browser: Any, width: int = 1440, scheme: str = "light", scripts: bool = True) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts
        )
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pages") / "report.html"
    run = shutil.copytree(trained, file.parent / trained.name)
    assert main(["report", str(run), "--output", str(file)]) == 0
    return file


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (360, "light"), (1440, "dark"), (1440, "light")])
def test_a_report_in_a_browser(browser: Any, report: Path, width: int, scheme: str) -> None:
    watched = Watched(browser, width, scheme)
    page = watched.page
    page.goto(report.as_uri())
    assert watched.errors == []
    assert {url for url in watched.requests if not url.startswith("data:")} == {report.as_uri()}
    assert [s.get_attribute("id") for s in page.query_selector_all("main > section")] == SECTIONS
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for folded in page.query_selector_all("summary"):
        folded.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(WIDER_THAN_THE_PAGE) == []
    assert page.evaluate(ILLEGIBLE) == []
    images = page.query_selector_all("img")
    assert len(images) > 20
    assert all(image.get_attribute("alt") for image in images)
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.tHead && t.caption)")
    drawings = "[...document.querySelectorAll('svg:not([aria-hidden])')]"
    assert page.evaluate(f"{drawings}.every(s => s.ariaLabel || s.querySelector('title'))")
    light = (
        sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])) > 382
    )
    assert light == (scheme == "light")
    watched.context.close()


@pytest.mark.parametrize("width", [360, 1440])
def test_all_letters_of_charts_can_be_read(browser: Any, tmp_path: Path, width: int) -> None:
    """Small rates, many classes, long names of wide letters."""
    charts = [
        line_chart([Series("a", [1, 2], rates)], title="T", description="", x_label="step", y_label="learning rate")
        for rates in ([0.0085, 0.0085], [1.0e-4, 1.4e-4])
    ]
    names = ["class number 00123456", "WWWMMM Number 0123456789", "虎" * 20, "dog & “wolf”"]
    charts.append(bar_chart(names, [0.1, 0.2, 0.5, 1.0], title="T", description=""))
    for classes in (2, 10, 16, 20, 30):
        named = [names[k % len(names)] for k in range(classes)]
        words = {"title": "T", "description": "", "row_label": "true class", "column_label": "predicted class"}
        charts.append(heat_map(np.eye(classes), named, named, texts=[["1"] * classes] * classes, **words))
    file = tmp_path / "charts.html"
    file.write_text(page_of("charts", [Section("charts", "Charts", grid(*charts))]))
    watched = Watched(browser, width)
    watched.page.goto(file.as_uri())
    assert watched.page.evaluate(ILLEGIBLE) == []
    watched.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_shows_on_which_side_there_is_more_of_it(browser: Any, tmp_path: Path, scheme: str) -> None:
    wide = table(["key", *"ABC"], [["x", *["\u00a0" * 40] * 3]] * 3, caption="Wide")
    narrow = table(["a", "b"], [["1", "2"]] * 3, caption="Narrow")
    file = tmp_path / "tables.html"
    file.write_text(page_of("tables", [Section("tables", "Tables", wide + narrow)]))
    watched = Watched(browser, 360, scheme)
    watched.page.goto(file.as_uri())

    def edges(place: int) -> list[bool]:
        """Whether the left and the right edge have another colour than the page, between two lines of letters."""
        region = watched.page.locator(".scroll").nth(place)
        pixels = np.asarray(Image.open(io.BytesIO(region.screenshot())).convert("RGB"), int)
        page_colour = np.asarray(Image.open(io.BytesIO(watched.page.screenshot())).convert("RGB"), int)[1, 1]
        return [bool(np.abs(pixels[3, x] - page_colour).sum() > 60) for x in (0, -1)]

    assert edges(0) == [False, True]
    assert edges(1) == [False, False]
    watched.page.locator(".scroll").first.evaluate("e => e.scrollLeft = 100")
    assert edges(0) == [True, True]
    watched.page.locator(".scroll").first.evaluate("e => e.scrollLeft = 9999")
    assert edges(0) == [True, False]
    watched.context.close()


def test_the_page_of_a_range_test(browser: Any, tmp_path: Path) -> None:
    """Its chart is no larger than those of other pages, and no rate is torn apart on a phone."""
    lrs = np.geomspace(1e-4, 1.0, 40)
    losses = (2 - np.exp(-((np.log10(lrs) + 1) ** 2))).tolist()
    found = LrRange(lrs.tolist(), losses, losses, 1.0, suggest(lrs.tolist(), losses, diverged=True))
    assert all(suggestion.lr for suggestion in found.suggestions)
    file = tmp_path / "lr.html"
    file.write_text(curve_page(found, "tiny"))
    for width in (360, 1440):
        watched = Watched(browser, width)
        watched.page.goto(file.as_uri())
        assert watched.page.locator("figure.chart").bounding_box()["width"] <= 700
        assert watched.page.evaluate(ILLEGIBLE) == []
        rates = watched.page.locator("tbody .number")
        heights = [rates.nth(i).bounding_box()["height"] for i in range(rates.count())]
        assert len(heights) == 2
        assert max(heights) < 30  # one line
        watched.context.close()


def test_values_under_the_pointer(browser: Any, report: Path) -> None:
    watched = Watched(browser)
    page = watched.page
    page.goto(report.as_uri())
    chart = page.locator("#curves svg[data-plot]").first
    chart.scroll_into_view_if_needed()
    chart.hover(position={"x": 200, "y": 100})
    told = page.locator("#curves .values").first
    assert told.is_visible()
    assert re.search(r"^\d+\ntraining: [\d.]+\ntest: [\d.]+", told.inner_text())
    page.locator("h1").hover()
    assert not told.is_visible()
    assert watched.errors == []
    page.get_by_role("link", name="Worst mistakes").click()
    assert page.evaluate("location.hash") == "#mistakes"


def test_values_under_the_pointer_are_the_runs_own(browser: Any, tmp_path: Path) -> None:
    """Not what a place in tenths of a pixel tells: epochs are whole, and small values stay beside large ones."""
    losses = [900.0, *(0.3 + i / 1000 for i in range(99))]
    drawn = line_chart([Series("test", range(1, 101), losses)], title="Loss", description="", x_label="epoch")
    shares = line_chart([Series("test", range(1, 101), [0.1, *([0.46239] * 99)])], title="Accuracy", description="",
                        x_label="epoch", as_percent=True)  # fmt: skip
    file = tmp_path / "page.html"
    file.write_text(page_of("T", [Section("a", "A", drawn), Section("b", "B", shares)]))
    watched = Watched(browser)
    watched.page.goto(file.as_uri())
    for section, last in (("a", "0.398"), ("b", "46.24%")):
        chart = watched.page.locator(f"#{section} svg[data-plot]")
        width = chart.bounding_box()["width"]  # type: ignore[index]
        told = set()
        for share in range(20, 96, 5):
            chart.hover(position={"x": width * share / 100, "y": 100})
            told.add(watched.page.locator(f"#{section} .values").inner_text())
        assert all(re.fullmatch(r"\d+\ntest: \S+", text) for text in told), told
        assert any(text == f"100\ntest: {last}" for text in told)
        for text in told:
            epoch, value = text.split("\ntest: ")
            if section == "a":
                assert float(value) == pytest.approx(losses[int(epoch) - 1], rel=1e-4)
    watched.context.close()


def test_without_scripts_all_is_there(browser: Any, report: Path) -> None:
    watched = Watched(browser, scripts=False)
    watched.page.goto(report.as_uri())
    assert watched.page.locator("main > section").count() == len(SECTIONS)
    assert watched.page.locator("svg polyline").count() >= 6
    watched.page.locator("summary", has_text="Recipe").click()
    assert watched.page.locator("pre", has_text="name: digits").is_visible()


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
def test_a_served_report_follows_its_run(browser: Any, run: Path) -> None:
    checkpoints = sorted((run / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    aside = run.parent / "aside"
    shutil.move(checkpoints[-1], aside)
    (run / "result.json").unlink()
    watched = Watched(browser)
    page = watched.page
    with served(run) as (url, process):
        page.goto(url)
        page.wait_for_selector(f".badge:has-text('{checkpoints[0].name}')", timeout=60_000)
        page.locator("summary", has_text="Recipe").click()
        record = {"kind": "epoch", "split": "test", "step": 999, "epoch": 3, "loss": 0.1, "accuracy": 0.9876}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        page.wait_for_selector("#summary strong:has-text('98.76%')", timeout=60_000)
        assert page.locator("pre", has_text="name: digits").is_visible()  # what was folded out stays so
        shutil.move(aside, checkpoints[-1])
        page.wait_for_selector(f".badge:has-text('{checkpoints[-1].name}')", timeout=60_000)
        page.locator("#curves svg[data-plot]").first.hover(position={"x": 200, "y": 100})
        assert page.locator("#curves .values").first.is_visible()  # in a part that was put in anew
        assert watched.errors == []
        assert all(asked.startswith((url, "data:")) for asked in watched.requests)
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
