"""FFCV's thread comes to its end, and what numba compiles is compiled once a machine and never trusted when damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.data.loaders import build_loader, ffcv_available
from harness.data.prepare import Split, prepare
from harness.errors import HarnessError

pytestmark = pytest.mark.ffcv  # numba comes with it

HOW: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "augmentation": None, "workers": 2}


def few_images(count: int) -> Split:
    return prepare("synthetic", synthetic={"train_images": count}).split("train")


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[Any]:
    loader = build_loader("ffcv", few_images(40), device=torch.device("cpu"), **HOW)
    yield loader
    loader.close()


def test_an_epoch_that_was_ended_says_so(loader: Any) -> None:
    old = loader.batches([np.arange(8)] * 50, epoch=0)
    next(old)
    new = loader.batches([np.arange(8)] * 3, epoch=1)
    next(new)
    with pytest.raises(RuntimeError, match="began another"):
        next(old)
    assert len(list(new)) == 2


@pytest.mark.timeout(60)
def test_an_error_in_ffcvs_thread_arrives(loader: Any) -> None:
    good = loader._fused.table_CV
    loader._fused.table_CV = "no table"
    threads = threading.active_count()
    with pytest.raises(Exception, match=r"(?s)non-precise|Cannot determine|unicode|typing"):
        list(loader.batches([np.arange(4)] * 9, epoch=0))
    assert threading.active_count() == threads
    loader._fused.table_CV = good
    assert len(list(loader.batches([np.arange(4)] * 9, epoch=0))) == 9


def test_a_process_may_end_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    path = few_images(40).path
    script = f"""
import numpy as np, torch
from pathlib import Path
from harness.data.loaders import build_loader
from harness.data.prepare import open_beton
loader = build_loader("ffcv", open_beton(Path({str(path)!r})), device=torch.device("cpu"), **{HOW!r})
batches = loader.batches([np.arange(40)] * 100_000, epoch=0)
print(len(next(batches).ids_B))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "40", "")


def test_without_ffcv_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ffcv_available()
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.delitem(sys.modules, "harness.data.ffcv_loader", raising=False)
    with pytest.raises(HarnessError, match="ffcv cannot be imported") as caught:
        build_loader("ffcv", few_images(4), device=torch.device("cpu"), **HOW)
    for text in ("libopencv-dev libturbojpeg0-dev pkg-config g++", "pip install '.[ffcv]'", "data.loader=device"):
        assert text in str(caught.value)


def squares(out_B: np.ndarray) -> None:
    for index in range(len(out_B)):
        out_B[index] = index * index


def functions_compiled() -> int:
    """How many numba compiles for `squares`, which must get the numbers right."""
    import numba
    from numba.core import event

    from harness.data.ffcv_loader import compiled

    recorder, out_B = event.RecordingListener(), np.zeros(4, np.int64)
    event.register("numba:compile", recorder)
    try:
        compiled(squares, numba.void(numba.int64[::1]), parallel=False)(out_B)
    finally:
        event.unregister("numba:compile", recorder)
    assert out_B.tolist() == [0, 1, 4, 9]
    assert numba.config.CACHE_DIR == "", "the setting is put back"
    return len(recorder.buffer) // 2  # each has a start and an end


def test_what_was_compiled_is_kept_and_a_damaged_cache_is_replaced(empty_cache: Path) -> None:
    folder = empty_cache / "numba" / str(os.getuid())
    assert [functions_compiled(), functions_compiled()] == [1, 0]
    assert folder.stat().st_mode & 0o777 == 0o700
    for suffix in ("nbi", "nbc"):
        (file,) = folder.rglob(f"*.{suffix}")
        file.write_bytes(file.read_bytes()[:-9])
        assert [functions_compiled(), functions_compiled()] == [1, 0], suffix
    folder.chmod(0o777)
    assert functions_compiled() == 1, "a folder that others may write to is not used"
    shutil.rmtree(empty_cache)
    empty_cache.write_text("no folder")
    assert functions_compiled() == 1


@pytest.mark.slow
def test_the_first_batch_of_a_later_process_needs_no_compilation(empty_cache: Path) -> None:
    """Neither of ours nor of FFCV's: with any of it, the first batch takes seconds."""
    from scripts.benchmarks.first_batch import bench_first_batch

    result = bench_first_batch(rounds=1, loaders=("harness_ffcv",))
    first, later = result["contestants"]["harness_ffcv"]["functions_compiled"]
    assert first > 0
    assert later == 0
