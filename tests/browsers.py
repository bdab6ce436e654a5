"""The browser that pages are tested in: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import importlib.util
import shutil


def find_chromium() -> str | None:
    """Where Chromium lies; None where it is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def missing_browser() -> str | None:
    """What a test in a browser lacks, as a reason to skip it."""
    if importlib.util.find_spec("playwright") is None:
        return "needs playwright: pip install '.[dev]'"
    return None if find_chromium() else "needs Chromium (Debian: apt-get install chromium)"
