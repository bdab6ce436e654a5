"""A self-contained page: one HTML file with its style, light and dark, wide and narrow, without a network.

Everything put into a page is escaped unless it is `Markup`, which only our own templates and functions make.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import harness
from harness.errors import HarnessError

MARK = '<meta name="generator" content="harness'  # of the files that a page may be written over


@dataclass(frozen=True)
class Section:
    """A part of a page: `id` is its anchor, `lead` a sentence or two below the heading."""

    id: str
    title: str
    body: Markup
    lead: str = ""


def page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    badges: Sequence[str] = (),
    notes: Sequence[str] = (),
    version: str | None = None,
) -> str:
    """A whole HTML document.

    Args:
        badges: short words next to the heading, such as a state.
        notes: sentences about what is missing or broken, above the sections.
        version: of a served page, which follows the server's `version` and replaces what has changed.
    """
    parts = {"title": title, "subtitle": subtitle, "badges": badges, "notes": notes, "sections": sections}
    whole = render("page.html", **parts, version=version, harness_version=harness.__version__)
    return whole.encode("utf-8", "replace").decode()  # names of files may hold bytes that are no UTF-8


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str, numeric: Collection[int] = ()
) -> Markup:
    """A table that scrolls sideways where it is too wide; a row's first cell is its header, `numeric` columns are
    set flush right."""
    return render("table.html", header=header, rows=rows, caption=caption, numeric=numeric)


def facts(pairs: Mapping[str, Any], *, short: bool = False) -> Markup:
    """Names with their values, in columns, narrow ones for `short` values."""
    return render("facts.html", pairs=pairs, short=short)


def grid(*parts: Markup) -> Markup:
    """Charts and other parts side by side where there is room."""
    return Markup('<div class="grid">{}</div>').format(Markup("").join(parts))


def missing(sentence: str) -> Markup:
    """A sentence in place of what cannot be shown."""
    return Markup('<p class="missing">{}</p>').format(sentence)


def folded(summary: str, body: Markup) -> Markup:
    """A part that is opened by a click on its summary."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def check_target(path: Path) -> None:
    """Check that a page may be written there: to a new file, or over a page of ours.

    Raises:
        HarnessError: something else is there, or no folder that can be written to.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        hint = "Make it, or give another file."
        raise HarnessError("is no folder that can be written to", where=str(path.parent), hint=hint)
    try:
        with path.open(encoding="utf-8", errors="replace") as before:
            taken = MARK not in before.read(1000)
    except FileNotFoundError:
        taken = False
    except OSError:
        taken = True
    if taken:
        hint = "Give another file; nothing was overwritten."
        raise HarnessError("is there already and no page of ours", where=str(path), hint=hint)


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("harness.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values: Any) -> Markup:
    """One of the templates in `templates/`, its values escaped."""
    return Markup(_environment().get_template(template).render(**values))
