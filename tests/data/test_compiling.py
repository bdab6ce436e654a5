"""What numba compiles is compiled once a machine, kept where only this user writes, and never trusted when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.ffcv  # numba comes with it

FUNCTION = """
import json, numba
from numba.core import event
from harness.data.compiling import compiled, plain_dictionaries

recorder = event.RecordingListener()
event.register("numba:compile", recorder)

@compiled(numba.void(numba.int64[::1]))
def squares(out_B):
    for index in range(len(out_B)):
        out_B[index] = index * index

if __name__ == "__main__":
    import numpy as np
    out_B = np.zeros(4, np.int64)
    squares(out_B)
    assert numba.config.CACHE_DIR == "", "the setting is put back"
    print(json.dumps({"out": out_B.tolist(), "compiled": len(recorder.buffer) // 2}))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "squares.py"
    path.write_text(FUNCTION)
    return path


def run(script: Path, **environment: str) -> int:
    """Functions compiled by a process of its own, which must get the numbers right and print nothing else."""
    whole = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, str(script)], env=whole, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["out"] == [0, 1, 4, 9]
    return found["compiled"]


def folder_of(cache: Path) -> Path:
    return cache / "numba" / str(os.getuid())


def test_a_second_process_compiles_nothing(script: Path, empty_cache: Path) -> None:
    assert [run(script), run(script)] == [1, 0]
    assert folder_of(empty_cache).stat().st_mode & 0o777 == 0o700
    assert not list(script.parent.glob("__pycache__/*.nb?"))
    script.write_text(FUNCTION.replace("index * index", "index ** 2"))
    assert run(script) == 1, "another source is compiled anew"


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_cache_is_made_anew(suffix: str, script: Path, empty_cache: Path) -> None:
    run(script)
    (file,) = folder_of(empty_cache).rglob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:-9])
    assert [run(script), run(script)] == [1, 0]


def test_a_folder_that_others_may_write_to_is_not_used(script: Path, empty_cache: Path) -> None:
    run(script)
    folder_of(empty_cache).chmod(0o777)
    assert [run(script), run(script)] == [1, 1]


def test_without_a_place_for_a_cache_each_process_compiles(script: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert run(script, HARNESS_CACHE=str(tmp_path / "file")) == 1


@pytest.mark.slow
def test_the_first_batch_of_a_later_process_needs_no_compilation(empty_cache: Path, tmp_path: Path) -> None:
    """Neither of ours nor of FFCV's: with any of it, the first batch takes seconds."""
    from scripts.benchmarks.first_batch import bench_first_batch

    result = bench_first_batch(rounds=1, loaders=("harness_ffcv",))
    first, later = result["contestants"]["harness_ffcv"]["functions_compiled"]
    assert first > 0
    assert later == 0


def test_only_the_import_of_ffcv_gets_plain_dictionaries() -> None:
    import numba.typed

    from harness.data.compiling import plain_dictionaries

    kept = numba.typed.Dict
    with plain_dictionaries():
        assert numba.typed.Dict is dict
    assert numba.typed.Dict is kept
