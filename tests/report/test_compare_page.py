"""The page of `harness compare --html`: the terminal's words, and in a browser, light and dark, wide and narrow."""

from __future__ import annotations

import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.report.compare import compare
from harness.report.compare_page import comparison_page
from harness.report.compare_text import pair_sentences
from tests.handmade import write_run
from tests.report.test_browser import Watched

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


def test_one_run_and_runs_without_anything(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "small" / "empty", (), finished=False)
    page = words(comparison_page(compare([empty], checkpoint="last", weights="raw")))
    assert "No run has any figures yet." in page
    assert "No run has any records yet." in page
    assert "All runs are of one recipe." in page


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_in_a_browser(browser: Any, runs: list[Path], tmp_path: Path, width: int, scheme: str) -> None:
    file = tmp_path / "comparison.html"
    for compared in (runs[:2], runs):  # an earlier page is written over
        assert main(["compare", *map(str, compared), "--html", str(file)]) == 0
    watched = Watched(browser, width, scheme)
    page = watched.page
    page.goto(file.as_uri())
    assert watched.errors == []
    assert all(url.startswith(("file:", "data:")) for url in watched.requests)
    assert page.evaluate("window.hacked") is None
    assert page.title() == f"Comparison: {EVIL}"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("main section").count() == 5
    accuracy = page.locator("figure.chart").filter(has=page.get_by_text("Test accuracy", exact=True)).first
    styles = [line.get_attribute("style") or "" for line in accuracy.locator("polyline.series").all()]
    assert len(set(styles)) == len(styles) == 6  # every run has a line of its own
    colours = [re.findall(r"series-\d", style) for style in styles]
    assert colours == [["series-0"]] * 3 + [["series-1"]] * 3  # a colour a group
    assert accuracy.locator("svg").first.bounding_box()["width"] > 250
    watched.context.close()
