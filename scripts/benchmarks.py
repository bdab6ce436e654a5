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
from pathlib import Path

from harness.benchmarks.page import draw, page
from harness.benchmarks.report import bench_all

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure, or take what was measured, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contestant (default 5)")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="results of an earlier run")
    arguments = parser.parse_args()
    if arguments.source is None:
        date = datetime.date.today().isoformat()
        data = os.environ.get("HARNESS_DATA")
        if data:
            os.environ["HARNESS_DATA"] = str(Path(data).resolve())
        os.chdir(ROOT)  # recipes are looked for here
        measured = {"date": date, "results": bench_all(rounds=arguments.rounds)}
    else:
        measured = json.loads(arguments.source.read_text())
    docs = ROOT / "docs"
    (docs / "benchmarks.json").write_text(json.dumps(measured, indent=1) + "\n")
    draw(measured["results"], docs / "benchmarks.svg")
    (docs / "benchmarks.md").write_text(page(measured["results"], date=measured["date"], picture="benchmarks.svg"))


if __name__ == "__main__":
    main()
