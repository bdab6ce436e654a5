"""One rank of a real training that also writes which images it takes at which step.

Run by torchrun: trace_worker.py FOLDER train RECIPE … writes FOLDER/rank_<rank>.json: [step, ids] for each batch.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.cli import main
from harness.data.loaders import Batch
from harness.training.step import TrainingStep

trace: list[tuple[int, list[int]]] = []
real: Any = TrainingStep.__call__


def call(self: TrainingStep, batches: Iterator[Batch], **options: Any) -> None:
    def watched() -> Iterator[Batch]:
        for batch in batches:
            trace.append((options["step"], batch.ids_B.tolist()))
            yield batch

    real(self, watched(), **options)


TrainingStep.__call__ = call  # type: ignore[method-assign]
code = main(sys.argv[2:])
Path(sys.argv[1], f"rank_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(trace))
sys.exit(code)
