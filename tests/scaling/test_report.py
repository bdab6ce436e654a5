"""`harness scale` as people see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.cli import main
from harness.scaling.report import render_scale

SEED = str(Path(__file__).resolve().parents[2] / "recipes" / "seed.yaml")


def test_scale_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--step-ms 20 --gpus 8,1,64,1024 --network infiniband-ndr --json"
    assert main(["scale", SEED, *options.split()]) == 0
    result = json.loads(capsys.readouterr().out)
    for mode in ("strong", "weak"):
        assert [row["gpus"] for row in result[mode]] == [1, 8, 64, 1024]
        first = result[mode][0]
        assert first["step_ms"] == pytest.approx(20)
        assert first["images_per_second"] == pytest.approx(6400)
        assert (first["efficiency"], first["exchange_total_ms"]) == (pytest.approx(1), 0)
    assert "smaller than the number of GPUs" in result["strong"][3]["impossible"]
    efficiencies = [row["efficiency"] for row in result["weak"]]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert result["network"]["gpus_per_node"] == 8
    assert result["recipe"]["gradient_bytes"] == 4 * 380_646


def test_the_table_ends_with_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["scale", SEED, "training.sync_batch_norm=false", "--step-ms", "20", "--network", "alpha_us=5,gbps=9"])
        == 0
    )
    table, _, assumptions = capsys.readouterr().out.partition("\nAssumptions\n")
    assert "efficiency" in table
    assert "1,024  – a micro-batch of 128 images is smaller" in table
    for word in ("alpha 5 us, 9 Gbit/s", "Overlap", "Thakur", "20.0 ms a step", "as given"):
        assert word in assumptions
    assert "SyncBatchNorm" not in assumptions


@pytest.mark.slow
def test_a_recipe_is_measured_where_no_time_is_given(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.scaling.workload.MEASURE_SECONDS", 0.1)
    assert main(["scale", str(tiny), "--gpus", "1,2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["compute"]["step_ms"] > 0
    assert result["compute"]["how"].startswith("measured on")
    assert [row["images_per_gpu"] for row in result["strong"]] == [16, 8]
    assert [row["images_per_gpu"] for row in result["weak"]] == [16, 16]
    assert result["compute"]["measured_on"] == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("device", "said"), [("cpu", True), ("cuda", False), (None, False)])
def test_a_step_of_a_cpu_is_no_gpus(capsys: pytest.CaptureFixture[str], device: str | None, said: bool) -> None:
    assert main(["scale", SEED, "--step-ms", "20", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    result["compute"]["measured_on"] = device
    above, table, _ = render_scale(result).partition("strong scaling")
    assert table
    assert ("measured on a CPU and is no GPU's" in above) is said


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--network infiniband-nrd", 'HINT: Did you mean "infiniband-ndr"?'),
        ("--gpus 1,x", 'argument --gpus: must be a whole number of at least 1, not "x"'),
        ("--gpus 0", "must be a whole number of at least 1"),
        ("--gpus 99999999999 --step-ms 3", "--gpus: a number of GPUs must be from 1 to 1,000,000"),
        ("--step-ms -3", "--step-ms: a step takes more than 0"),
        ("--step-ms 3 --gpus-per-node 0", "must be a whole number of at least 1"),
        ("--step-ms 3 model.name=resnet81", "HINT: Did you mean"),
    ],
)
def test_mistakes_are_explained(options: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", SEED, *options.split()]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "HINT:" in error
    assert "Traceback" not in error
