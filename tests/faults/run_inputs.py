"""The long form of the bad inputs: `python -m tests.faults.run_inputs --work DIR [--count N]`, into inputs.json."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.inputs import KINDS, run_kind


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "inputs.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, kind in KINDS.items():
        count = math.ceil(arguments.count * kind.share)
        if found.get(name, {}).get("tried", 0) >= count:
            continue
        begin = time.monotonic()
        tried, problem = run_kind(kind, count, arguments.work / "inputs" / name, random_seed=arguments.seed)
        found[name] = {"tried": tried, "problem": problem}
        file.write_text(json.dumps(found, indent=1))
        seconds = time.monotonic() - begin
        print(f"{name}: {tried} tried in {seconds:.0f} s, {problem or 'nothing found'}", flush=True)
    return 1 if any(entry["problem"] for entry in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
