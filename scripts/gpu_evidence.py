#!/usr/bin/env python3
"""Measure on a GPU machine, which may be offline: GPU-marked tests, loaders and training steps beside the memory
roofline, whole trainings. Everything goes into one JSON file, which later calls add to and go on with.

scripts/gpu_evidence.py --out FILE [--work DIR] [--part tests|loader|step|train]... [--minutes 9] [--dry-run]

Exit codes: 0 all is measured; 75 the time was over first, call again with the same --out and --work; 1 a test, a step
or a training failed, see the file and the logs in --work; 2 wrong options, or no GPU.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.benchmarks.gpu import evidence, evidence_page, evidence_parts
from harness.errors import HarnessError, print_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file")
    parser.add_argument("--work", type=Path, metavar="DIR", help="run directories and logs (default: beside --out)")
    parser.add_argument("--part", action="append", default=[], metavar="PART", help="only this; may be repeated")
    parser.add_argument("--recipe", type=Path, action="append", metavar="FILE", help="trained (default: the seed's)")
    parser.add_argument("--minutes", type=_minutes, default=9.0, metavar="N", help="the call ends before (default 9)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too: no evidence")
    parser.add_argument("--page", type=Path, metavar="FILE", help="measure nothing; write the figures into this page")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    try:
        if options.page:
            evidence_page.write(options.out, options.page)
            return 0
        evidence_parts.limit_threads(dry_run=options.dry_run)
        call = evidence.Call(
            device=evidence.find_device(dry_run=options.dry_run),
            dry_run=options.dry_run,
            work=(options.work or options.out.with_suffix(".runs")).absolute(),
            deadline=deadline,
            command=" ".join(["scripts/gpu_evidence.py", *(f"--part {name}" for name in options.part)]),
            recipes=tuple(path.absolute() for path in options.recipe or [evidence.ROOT / "recipes" / "seed.yaml"]),
        )
        return evidence.gather(call, evidence_parts.PARTS, options.part, options.out)
    except HarnessError as error:
        print_error(error)
        return error.exit_code


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:  # NaN is refused, too
        raise argparse.ArgumentTypeError(f'must be a number above 0, not "{text}"')
    return minutes


if __name__ == "__main__":
    sys.exit(main())
