"""`harness` with faults in it: `python -m tests.faults.child train …`, the faults as JSON in `$HARNESS_TEST_FAULTS`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from tests.faults.inject import Fault, install

VARIABLE = "HARNESS_TEST_FAULTS"


def run(argv: Sequence[str], faults: list[Fault]) -> int:
    """Arm the faults, then do what the command line does."""
    from harness.cli import main

    install(faults)
    sys.argv = ["harness", *argv]
    return main(argv)


if __name__ == "__main__":
    given = os.environ.get(VARIABLE)
    sys.exit(run(sys.argv[1:], json.loads(given) if given else []))
