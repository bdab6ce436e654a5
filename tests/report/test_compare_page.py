"""The page of `harness compare --html`: the terminal's words, and in a browser, light and dark, wide and narrow."""

from __future__ import annotations

import re
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.cli import main
from harness.report.compare import compare
from harness.report.compare_page import comparison_page
from harness.report.compare_text import pair_sentences
from tests.handmade import write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVIL = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of each of two groups, without checkpoints; a name and a setting that would be markup."""
    paths = []
    for group, gain in (("a", 0.0), ("b", 0.1)):
        for seed in range(3):
            settings = {"seed": seed, "name": EVIL, "optimizer": {"lr": 0.1 + gain}, "model": {"args": {"x": EVIL}}}
            settings["model"]["args"]["y" + EVIL] = group + EVIL
            accuracies = [0.3 + gain, 0.5 + gain + 0.01 * seed, 0.6 + gain + 0.01 * seed]
            paths.append(write_run(tmp_path / "small" / f"{group}-{seed}", accuracies, settings=settings, ema=True))
    return paths


@pytest.fixture
def file(runs: list[Path], tmp_path: Path) -> Path:
    file = tmp_path / "comparison.html"
    assert main(["compare", *map(str, runs), "--html", str(file)]) == 0
    return file


def words(text: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_it_says_what_the_terminal_says(runs: list[Path]) -> None:
    found = compare(runs, checkpoint="last", weights="raw")
    page = words(comparison_page(found))
    for sentence in pair_sentences(found.pairs[0], found):
        assert sentence in page
    assert len(found.notes) == 6  # without checkpoints no run says anything of single images
    assert all(words(escape(note)) in page for note in found.notes)
    assert "61.00 ± 1.00%" in page
    assert "71.00 ± 1.00%" in page
    assert "Mean ± sample standard deviation over the runs of a group, n = 3." in page


def test_an_earlier_page_is_written_over(runs: list[Path], file: Path) -> None:
    before = file.read_text()
    assert main(["compare", *map(str, runs[:2]), "--html", str(file)]) == 0
    assert file.read_text() != before
    assert not list(file.parent.glob(".*.tmp"))


def test_one_run_and_runs_without_anything(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "small" / "empty", (), finished=False)
    page = words(comparison_page(compare([empty], checkpoint="last", weights="raw")))
    assert "No run has any figures yet." in page
    assert "No run has any records yet." in page
    assert "All runs are of one recipe." in page


def opened(browser: Browser, file: Path, *, width: int, scheme: str) -> tuple[Page, list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(file.as_uri())
    return page, troubles


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_in_a_browser(browser: Browser, file: Path, width: int, scheme: str) -> None:
    page, troubles = opened(browser, file, width=width, scheme=scheme)
    assert troubles == []
    assert page.evaluate("window.hacked") is None
    assert page.title() == f"Comparison: {EVIL}"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("main section").count() == 5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
    assert brightness > 600 if scheme == "light" else brightness < 150
    accuracy = page.locator("figure.chart").filter(has=page.get_by_text("Test accuracy", exact=True)).first
    lines = accuracy.locator("polyline.series")
    assert lines.count() == 6
    styles = [line.get_attribute("style") or "" for line in lines.all()]
    assert len(set(styles)) == 6  # every run has a line of its own
    colours = [re.search(r"series-\d", style) for style in styles]
    assert [colour and colour[0] for colour in colours] == ["series-0"] * 3 + ["series-1"] * 3  # a colour a group
    box = accuracy.locator("svg").first.bounding_box()
    assert box is not None
    assert box["width"] > 250
    page.close()
