"""Checkpoints that are whole by their manifest, and yet say what no training ever wrote."""

from __future__ import annotations

import json
import time

from tests.faults.check import contents, said_well
from tests.faults.examples import changed, paths_of
from tests.faults.fault import Outcome, fault
from tests.faults.inputs import manifest_of
from tests.faults.rows_damage import stopped
from tests.faults.runs import Stage

VALUES = (None, -1, 10**9, 1.5, "x", [], {}, [[]], {"step": {}}, True, 10**300)


@fault(
    "forged-state",
    "A checkpoint with a forged state.json",
    "one entry of every checkpoint's state.json replaced or left out at random and the manifest made to fit: refused "
    "with code 2 and the checkpoints unchanged in content, or gone on with",
    trials=24,
    short=0,
)
def forged_state(stage: Stage, index: int) -> Outcome:
    stopped(stage)
    notes = []
    for folder in (stage.run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        way = stage.rng.choice([w for w in paths_of(state) if w])
        value = stage.rng.choice(VALUES)
        (folder / "state.json").write_text(json.dumps(changed(state, [(way, value)])))
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
        (folder / "manifest.json").write_text(manifest_of(files))
        notes.append(f"{folder.name} {'.'.join(map(str, way))} = {str(value)[:12]}")
    before = sorted(contents(stage.run / "checkpoints").values())
    process = stage.train()
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = []
    if code == 2:
        wrong = said_well(process.text())
        if sorted(contents(stage.run / "checkpoints").values()) != before:
            wrong.append("checkpoints were changed")
    elif code not in (0, 3) or "Traceback" in process.text():  # other numbers may train on, or diverge
        wrong.append(f"exit code {code}: {process.text()[-400:]}")
    return Outcome(not wrong, 0, detect, None, "; ".join([*notes, *wrong]))
