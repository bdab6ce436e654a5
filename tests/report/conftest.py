"""Small real runs, trained once for all tests of this folder that only read them, and pages in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from tests.conftest import TINY

DIGITS = """
seed: 0
data: {source: digits, loader: device}
model:
  name: dual_branch
  args: {widths: [[8, 16], [16]], transition_widths: [16], head_width: 16, dropout: 0.1}
training: {epochs: 2, global_batch_size: 64}
optimizer: {lr: 0.1}
ema: {decay: 0.9}
tracking: {wandb: disabled, log_every_steps: 1}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the handwritten digits; not to be written to."""
    folder = tmp_path_factory.mktemp("digits")
    recipe = folder / "digits.yaml"
    recipe.write_text(DIGITS)
    run = folder / "runs" / "digits" / "20260101-000000-aaaa"
    assert main(["train", str(recipe), "--run-dir", str(run)]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, of this test alone."""
    return Path(shutil.copytree(trained, tmp_path / "digits" / trained.name))


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs `a-0` … `a-2` and `b-0` … `b-2`, of another learning rate; not to be changed."""
    folder = tmp_path_factory.mktemp("seeds")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    for name, lr in (("a", 0.1), ("b", 0.0001)):
        for seed in range(3):
            overrides = [f"seed={seed}", f"optimizer.lr={lr}", "model.args.dropout=0.0", "ema.decay=0.5"]
            assert main(["train", str(recipe), *overrides, "--run-dir", str(folder / f"{name}-{seed}")]) == 0
    return folder


OpenPage = Callable[..., Any]


@pytest.fixture
def open_page() -> Iterator[OpenPage]:
    """`open_page(file or address, width=…, scheme=…, scripts=…)` in Debian's Chromium, without a window.

    The page has `errors`, all that went wrong in it, and `requests`, all that it asked for but data in itself.
    """
    from playwright.sync_api import sync_playwright

    from tests.browsers import find_chromium

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])

        def opened(address: Path | str, width: int = 1440, scheme: str = "light", scripts: bool = True) -> Any:
            viewport = {"width": width, "height": 800}
            context = browser.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=scripts)
            page = context.new_page()
            page.errors, page.requests = [], []
            page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on("request", lambda r: None if r.url.startswith("data:") else page.requests.append(r.url))
            page.goto(address.as_uri() if isinstance(address, Path) else address)
            return page

        yield opened
        browser.close()
