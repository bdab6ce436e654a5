"""Checkpoints and the predictions table, by the real client on a real server."""

from __future__ import annotations

import json

import pytest

from tests.faults.check import differences
from tests.faults.runs import Stage
from tests.faults.wandb_server import WandbServer, environment
from tests.tracking.conftest import rows_of, wandb_id
from tests.tracking.door import Door


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["all", "best"])
def test_checkpoints_with_aliases_and_the_predictions_table_arrive(
    wanted: str, wandb_server: WandbServer, door: Door, stage: Stage
) -> None:
    words = ("tracking.wandb=online", f"tracking.artifacts={wanted}", f"tracking.predictions_table={wanted == 'all'}")
    process = stage.train(*words, env=environment(door.port))
    assert process.wait() == 0, process.text()
    assert "W&B goes without" not in process.text()
    assert differences(stage.run, stage.reference()) == []
    run_id, best = wandb_id(stage.run), json.loads((stage.run / "result.json").read_text())["best"]
    kept = sorted(int(p.name[5:]) for p in (stage.run / "checkpoints").glob("step_*"))
    sent = [best["step"]] if wanted == "best" else kept
    models = [facts for _, kind, facts in wandb_server.artifacts(run_id) if kind == "model"]
    assert [facts["step"] for facts in models] == sent
    assert [f["test_accuracy"] for f in models if f["step"] == best["step"]] == [best["accuracy"]]
    aliases = [{alias["alias"] for alias in given} for given in door.values("aliases")]
    is_best, is_last = {best["step"]: {"best"}}, {kept[-1]: {"last"}}
    expected = [{f"step_{step}"} | is_best.get(step, set()) | is_last.get(step, set()) for step in sent]
    assert [given - {"latest"} for given in aliases[-len(sent) :]] == expected
    assert wandb_server.history(run_id) == rows_of(stage.run)
    if wanted == "all":
        _check_tables(wandb_server, run_id, best)


def _check_tables(server: WandbServer, run_id: str, best: dict[str, int]) -> None:
    tables = {name: path for name, path in server.files(run_id).items() if name.startswith("media/table/predictions/")}
    worst, confusion = (
        next(json.loads(path.read_text()) for name, path in tables.items() if f"/{table}" in name)
        for table in ("worst", "confusion")
    )
    total, correct = best["total"], best["correct"]
    assert len(worst["data"]) == total - correct > 0
    probabilities = [row[worst["columns"].index("label probability")] for row in worst["data"]]
    assert probabilities == sorted(probabilities)
    assert sum(count for *_, count in confusion["data"]) == total
    assert sum(count for label, taken, count in confusion["data"] if label == taken) == correct
