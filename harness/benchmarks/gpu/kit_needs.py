"""Which packages a machine lacks, worked out by pip here from a list of what is there.

An environment of the same Python is filled with stand-ins: metadata without content, one for each package that the
other machine has. pip then resolves the project's dependencies against them and names what is missing or too old,
without fetching torch. Python's own library alone: it runs in that environment.

    python -m harness.benchmarks.gpu.kit_needs requirements              # prints what the project needs there
    python -m harness.benchmarks.gpu.kit_needs stand-ins [--there FILE]  # into the environment of this Python
    python -m harness.benchmarks.gpu.kit_needs missing REPORT            # of pip install --dry-run --report
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import EXIT_DONE, HarnessError, print_error

PROJECT_FILE = Path(__file__).resolve().parents[3] / "pyproject.toml"

# Taken for granted on a GPU machine, in the oldest versions that pyproject.toml allows; they bring NVIDIA's libraries.
ALWAYS_THERE = {"torch": "2.9.0", "torchvision": "0.24.0"}
# ffcv is in the kit as a wheel built here. Nothing can be sent to W&B from there, and all works without it.
LEFT_OUT = ("ffcv", "wandb")
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis")
# Two packages of one module; ffcv asks for the first, which wants a desktop's libraries. The other does without.
OPENCV, OPENCV_HEADLESS = "opencv-python", "opencv-python-headless"


def normalised(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(project: Mapping[str, Any]) -> list[str]:
    """What trainings, benchmarks and GPU tests need, from the content of pyproject.toml, without torch."""
    table = project["project"]
    extras = table["optional-dependencies"]
    tools = [text for text in extras["dev"] if _name(text) in TEST_TOOLS]
    wanted = [*table["dependencies"], *extras["ffcv"], *tools, OPENCV_HEADLESS]
    return [text for text in wanted if _name(text) not in {*LEFT_OUT, *ALWAYS_THERE}]


def _name(requirement: str) -> str:
    return normalised(re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0])


def read_there(text: str) -> dict[str, str]:
    """Packages and versions from the lines NAME==VERSION of `pip list --format=freeze`; # begins a comment.

    opencv-python counts as there in any case: what it lacks is asked for as opencv-python-headless.

    Raises:
        HarnessError: a line of another form, with its number.
    """
    found = dict(ALWAYS_THERE)
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)", entry)
        if match is None:
            raise HarnessError(
                f'line {number} is not NAME==VERSION: "{entry}"',
                where="--there",
                hint="Give the output of `python3 -m pip list --format=freeze` on that machine.",
            )
        found[normalised(match[1])] = match[2]
    if OPENCV in found:
        found.setdefault(OPENCV_HEADLESS, found[OPENCV])
    found.setdefault(OPENCV, found.get(OPENCV_HEADLESS, "0"))
    return found


def write_stand_ins(there: Mapping[str, str], site_packages: Path) -> None:
    """Metadata of packages that are not really here, in the form that pip reads (PEP 376)."""
    for name, version in there.items():
        folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "INSTALLER").write_text("stand-in\n")
        (folder / "RECORD").write_text("")


def missing(report: Mapping[str, Any]) -> list[str]:
    """NAME==VERSION of all that pip would install, but for what is left out, sorted."""
    entries: Iterable[Mapping[str, str]] = (item["metadata"] for item in report["install"])
    return sorted(f"{e['name']}=={e['version']}" for e in entries if normalised(e["name"]) not in LEFT_OUT)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text; returns the exit code."""
    parser = argparse.ArgumentParser(description="What a machine lacks.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("requirements")
    actions.add_parser("stand-ins").add_argument("--there", type=Path)
    actions.add_parser("missing").add_argument("report", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.action == "requirements":
            print("\n".join(requirements(tomllib.loads(PROJECT_FILE.read_text()))))
        elif options.action == "stand-ins":
            there = read_there(options.there.read_text() if options.there else "")
            write_stand_ins(there, Path(sysconfig.get_paths()["purelib"]))
        else:
            print("\n".join(missing(json.loads(options.report.read_text()))))
    except HarnessError as error:
        print_error(error)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
