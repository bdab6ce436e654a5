"""The process of one contestant; `contest.py` starts it and gives its turns."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import warnings
from typing import Any, TextIO


def main(what: dict[str, Any]) -> None:
    """Prepare, then do a round for each line that comes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    os.environ.setdefault("WANDB_MODE", "disabled")
    if what["needs"] is not None and importlib.util.find_spec(what["needs"]) is None:
        _answer(answers, ready=False)
        return
    warnings.simplefilter("ignore")
    module, _, name = what["target"].partition(":")
    one_round = getattr(importlib.import_module(module), name)(**what["arguments"])
    _answer(answers, ready=True)
    for _ in sys.stdin:
        seconds, count, *payload = one_round()
        _answer(answers, seconds=seconds, count=count, payload=payload)


def _answer(answers: TextIO, **fields: Any) -> None:
    answers.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
