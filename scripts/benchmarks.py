"""Runs the benchmarks against peers and writes docs/benchmarks.md with its picture and docs/benchmarks.json.

    python scripts/benchmarks.py [--rounds N] [--from FILE]

Takes about ten minutes on two quiet cores. Needs the extras ffcv and bench (pip install '.[ffcv,bench]'); what is not
installed is left out and said so. HARNESS_DATA=DIR: a folder with the real CIFAR-10 (else random images).
--from FILE makes the page anew from results that were taken before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from harness.benchmarks.page import draw, page
from harness.benchmarks.report import bench_all
from harness.errors import HarnessError, print_error
from harness.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measure, or take what was measured, and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contestant (default 5)")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="results of an earlier run")
    arguments = parser.parse_args()
    try:
        _write(_measured(arguments.rounds) if arguments.source is None else _earlier(arguments.source))
    except HarnessError as error:
        print_error(error)
        return error.exit_code
    return 0


def _measured(rounds: int) -> dict[str, Any]:
    date = datetime.date.today().isoformat()
    data = os.environ.get("HARNESS_DATA")
    if data:
        os.environ["HARNESS_DATA"] = str(Path(data).resolve())
    os.chdir(ROOT)  # recipes are looked for here
    return {"date": date, "results": bench_all(rounds=rounds)}


def _earlier(source: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        page(found["results"], date=found["date"], picture="")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(
            f"holds no results of this script ({type(error).__name__}: {error})",
            where=str(source),
            hint="Give a docs/benchmarks.json that it has written.",
        ) from error
    return found


def _write(measured: dict[str, Any]) -> None:
    docs = ROOT / "docs"
    draw(measured["results"], docs / "benchmarks.svg")
    write_json(docs / "benchmarks.json", measured)
    write_text(docs / "benchmarks.md", page(measured["results"], date=measured["date"], picture="benchmarks.svg"))


if __name__ == "__main__":
    sys.exit(main())
