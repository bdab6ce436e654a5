"""The long form: every row with its full number of trials, a line of JSON each, so that it can go on where it stopped.

`python -m tests.faults.run_all --work DIR [--jobs N] [--only NAME …] [--trials N]`; scripts/faults.sh calls it and
then renders the table.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import rows
from tests.faults.fault import Fault, NoMoreCases, NotHere, run_trial
from tests.faults.runs import RECIPE, Server


class Results:
    """trials.jsonl: what was tried already, and room for more."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = [json.loads(line) for line in lines]
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()

    def has(self, row: str, index: int) -> bool:
        return any(r["row"] == row and r["index"] in (index, -1) for r in self.found)

    def add(self, record: dict[str, object]) -> None:
        with self._lock:
            self.found.append(record)
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the trials and of trials.jsonl")
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    parser.add_argument("--only", nargs="*", default=list(rows.REGISTRY), choices=rows.REGISTRY, metavar="NAME")
    parser.add_argument("--trials", type=int, default=10**6, help="at most this many a row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "faults.yaml").write_text(RECIPE)
    results = Results(work / "trials.jsonl")
    chosen = [rows.REGISTRY[name] for name in arguments.only]
    todo = {load: queue.Queue[tuple[Fault, int]]() for load in ("light", "heavy", "waiting")}
    cases = [(row, index) for row in chosen for index in range(min(row.trials, arguments.trials))]
    for row, index in sorted(cases, key=lambda case: (case[1] + 0.5) / case[0].trials):  # all rows advance together
        if not results.has(row.name, index):
            todo[row.load].put((row, index))
    total = sum(each.qsize() for each in todo.values())
    print(f"{total} trials to do, {len(results.found)} done before, in {work}", flush=True)
    # One of the threads takes the heavy rows first, and one that does not count those that wait.
    queues = [[todo["heavy"], todo["light"]], *[[todo["light"]]] * (arguments.jobs - 1), [todo["waiting"]]]
    threads = [threading.Thread(target=_work, args=(q, work, results, arguments.seed)) for q in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.close()
    failed = [r for r in results.found if not r["survived"] and "skipped" not in r]
    for record in failed:
        print(f"NOT SURVIVED {record['row']} {record['index']}: {str(record['note'])[:300]}")
    return 1 if failed else 0


def _work(queues: list[queue.Queue[tuple[Fault, int]]], work: Path, results: Results, seed: int) -> None:
    server = Server(work / "cache")
    try:
        for each in queues:
            while True:
                try:
                    row, index = each.get_nowait()
                except queue.Empty:
                    break
                if not results.has(row.name, -1):
                    _one(row, index, work, server, results, seed)
    finally:
        server.close()


def _one(row: Fault, index: int, work: Path, server: Server, results: Results, seed: int) -> None:
    begin = time.monotonic()
    try:
        outcome = run_trial(row, index, work, server, seed=seed)
    except NoMoreCases:
        return
    except NotHere as reason:
        results.add({"row": row.name, "index": -1, "survived": False, "skipped": str(reason), "note": str(reason)})
        print(f"{row.name}: skipped: {reason}", flush=True)
        return
    results.add({"row": row.name, "index": index, **outcome.to_json()})
    word = "survived" if outcome.survived else "NOT SURVIVED"
    seconds = time.monotonic() - begin
    print(f"{time.strftime('%H:%M:%S')} {row.name} {index}: {word} in {seconds:.1f} s {outcome.note[:200]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
