"""A self-contained page: one HTML file with its style, light and dark, wide and narrow, without a network.

Everything put into a page is escaped unless it is `Markup`, which only our own templates and functions make.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
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
    body: Markup | str = ""
    lead: str = ""


def page(title: str, sections: Sequence[Section], *, template: str = "page.html", **values: Any) -> str:
    """A whole HTML document.

    Args:
        template: `page.html`, or one that extends it.
        values: of the template; of `page.html` a `subtitle`, `badges` (short words next to the heading), `notes`
            (sentences on what is missing, above the sections) and the `version` of a served page, which follows the
            server's `version` and replaces what has changed.
    """
    optional = {"subtitle": "", "badges": (), "notes": (), "version": None}
    known = {"title": title, "sections": sections, "harness_version": harness.__version__}
    whole = render(template, **optional | known | values)
    return whole.encode("utf-8", "replace").decode()  # names of files may hold bytes that are no UTF-8


def missing(sentence: str) -> Markup:
    """A sentence in place of what cannot be shown."""
    return Markup('<p class="missing">{}</p>').format(sentence)


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
    options: Any = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    found = Environment(loader=PackageLoader("harness.report"), **options)
    found.globals["parts"] = found.get_template("parts.html").module
    return found


def render(template: str, **values: Any) -> Markup:
    """One of the templates in `templates/`, its values escaped."""
    return Markup(_environment().get_template(template).render(**values))
