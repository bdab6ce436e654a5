"""The all-reduce benchmark: what is held out, and the form of a short real measurement. Figures: docs/results.md."""

from __future__ import annotations

import json

import pytest

from harness.benchmarks.allreduce import bench_allreduce, choose_held_out, render_allreduce
from harness.cli import main
from harness.errors import HarnessError
from harness.scaling.fitting import Measured

SIZES = [4096, 16384, 65536]


def points(*ranks: int) -> list[Measured]:
    return [Measured(n, size, 1.0) for n in ranks for size in SIZES]


@pytest.mark.parametrize(
    ("ranks", "cores", "whole"),
    [
        ((2, 3, 4), 2, 4),  # 2 gives alpha and beta, 3 the wait
        ((2, 3), 2, None),  # nothing else would give the wait
        ((2,), 2, None),
        ((2, 3, 4), 8, 4),
        ((2, 3, 4), 1, 4),
    ],
)
def test_what_is_held_out(ranks: tuple[int, ...], cores: int, whole: int | None) -> None:
    held_out = choose_held_out(points(*ranks), cores=cores)
    for point in points(*ranks):
        assert (point in held_out) == (point.ranks == whole or point.message_bytes == SIZES[1])


@pytest.mark.slow
def test_real_all_reduces_are_measured_fitted_and_predicted() -> None:
    result = bench_allreduce(ranks=[2, 3], sizes_bytes=[4096, 65536, 2**20], rounds=2)
    assert json.loads(json.dumps(result)) == result
    rows = result["measurements"]
    assert [(row["ranks"], row["message_bytes"]) for row in rows] == [
        (n, size) for n in (2, 3) for size in (4096, 65536, 2**20)
    ]
    for row in rows:
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"] < 60
        assert row["predicted_seconds"] / row["seconds_min"] - 1 == pytest.approx(row["error_percent"] / 100)
    held = [abs(row["error_percent"]) for row in rows if row["held_out"]]
    assert result["held_out"]["points"] == len(held) > 0
    assert result["held_out"]["error_percent_max"] == pytest.approx(max(held))
    assert sum(part["points"] for part in (result["held_out_sizes"], result["held_out_ranks"]) if part) == len(held)
    assert result["fitted"]["points"] == len(rows) - len(held)
    assert result["model"]["alpha_us"] > 0
    assert result["settings"]["threads_per_rank"] == 1
    assert result["machine"]["versions"]["torch"]
    text = render_allreduce(result)
    assert text.count("held out") == len(held)
    assert "alpha" in text


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"ranks": [1, 2]}, "2 ranks or more"),
        ({"ranks": []}, "2 ranks or more"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"sizes_bytes": [4, 8]}, "three message sizes"),
        ({"sizes_bytes": [4, 8, 9]}, "multiple of 4"),
    ],
)
def test_numbers_out_of_range(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(HarnessError, match=text):
        bench_allreduce(**wrong)  # type: ignore[arg-type]


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "allreduce", "--ranks", "1,2"]) == 2
    assert "--ranks: an all-reduce needs 2 ranks or more\n  HINT:" in capsys.readouterr().err
