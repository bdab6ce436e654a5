"""Whole trainings on two ranks: what the real client sends of them besides curves, and what a real server holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunRanks
from tests.faults.check import records
from tests.faults.wandb_server import WandbServer, environment
from tests.tracking.conftest import rows_of, wandb_id
from tests.tracking.door import Door

DIGITS = """
data: {source: digits, loader: device, image_size_px: 8}
model:
  name: dual_branch
  args: {widths: [[4, 8], [8]], transition_widths: [8], head_width: 8, dropout: 0.2}
training: {epochs: 2, global_batch_size: 256}
ema: {decay: 0.5}
tracking: {wandb: online, log_every_steps: 2, artifacts: all, predictions_table: true}
"""


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["all", "best"])
def test_two_ranks_are_one_run_with_its_artifacts_and_its_history_is_metrics_jsonl(
    wanted: str, wandb_server: WandbServer, door: Door, run_ranks: RunRanks, tmp_path: Path
) -> None:
    (tmp_path / "two.yaml").write_text(DIGITS)
    run, before = tmp_path / "run", set(wandb_server.runs())
    fewer = ("tracking.artifacts=best", "tracking.predictions_table=false") if wanted == "best" else ()
    words = ("-m", "harness", "train", tmp_path / "two.yaml", "--run-dir", run, *fewer)
    done = run_ranks(2, *words, env=environment(door.port), timeout=250)  # a process classifies the test split
    assert done.returncode == 0, done.stderr
    assert "W&B goes without" not in done.stderr
    (run_id,) = set(wandb_server.runs()) - before
    assert run_id == wandb_id(run)
    assert len(records(run)) == 6 + 2 * 3  # log steps; of each epoch the training, raw and averaged weights
    assert wandb_server.history(run_id) == rows_of(run)
    there, best = wandb_server.runs()[run_id], json.loads((run / "result.json").read_text())["best"]
    assert (there["state"], there["name"]) == ("finished", "two-run")
    assert there["tags"] == ["model:dual_branch", "data:digits", "precision:no", "ranks:2"]
    assert there["config"]["training"]["value"]["global_batch_size"] == 256
    assert [there["summary"][f"best/{key}"] for key in ("accuracy", "epoch")] == [best["accuracy"], best["epoch"]]
    files = wandb_server.files(run_id)
    assert "Total params: " in files["model_summary.txt"].read_text()
    tables = {name: path for name, path in files.items() if name.startswith("media/table/predictions/")}
    assert bool(tables) == (wanted == "all")
    if tables:
        check_tables(tables, best)

    kept = sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_*"))
    sent = [best["step"]] if wanted == "best" else kept
    models = [facts for _, kind, facts in wandb_server.artifacts(run_id) if kind == "model"]
    assert [facts["step"] for facts in models] == sent
    assert [f["test_accuracy"] for f in models if f["step"] == best["step"]] == [best["accuracy"]]
    aliases = [{alias["alias"] for alias in given} - {"latest"} for given in door.values("aliases")]
    is_best, is_last = {best["step"]: {"best"}}, {kept[-1]: {"last"}}
    expected = [{f"step_{step}"} | is_best.get(step, set()) | is_last.get(step, set()) for step in sent]
    assert aliases[-len(sent) :] == expected


def check_tables(files: dict[str, Path], best: dict[str, Any]) -> None:
    worst, confusion = (
        next(json.loads(path.read_text()) for name, path in files.items() if f"/{table}" in name)
        for table in ("worst", "confusion")
    )
    total, correct = best["total"], best["correct"]
    assert len(worst["data"]) == min(100, total - correct) > 0
    probabilities = [row[worst["columns"].index("label probability")] for row in worst["data"]]
    assert probabilities == sorted(probabilities)
    assert sum(count for *_, count in confusion["data"]) == total
    assert sum(count for label, taken, count in confusion["data"] if label == taken) == correct
