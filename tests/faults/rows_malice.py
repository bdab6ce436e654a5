"""Files made to do harm: pickles under other names, paths that lead out. Refused, and nothing of them is run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.check import said_well
from tests.faults.fault import Outcome, fault
from tests.faults.inputs import manifest_of
from tests.faults.rows_damage import stopped
from tests.faults.runs import Process, Stage

CANARY = "canary"


class Bad:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._canary}",)


def _bytes(stage: Stage) -> bytes:
    return pickle.dumps(Bad(stage.folder / CANARY))


def _checkpoint(stage: Stage, name: str) -> Process:
    """A pickle in place of a checkpoint's file, and a manifest that fits it, in every checkpoint."""
    stopped(stage)
    for folder in (stage.run / "checkpoints").iterdir():
        (folder / name).write_bytes(_bytes(stage))
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
        (folder / "manifest.json").write_text(manifest_of(files))
    return stage.train()


def _beton(stage: Stage) -> Process:
    """A pickle in place of a .beton file, and a data manifest that fits it."""
    cache = stage.folder / "cache"
    shutil.copytree(stage.cache, cache)
    (store,) = (p for p in (cache / "data").iterdir() if p.is_dir())
    (store / "train.beton").write_bytes(_bytes(stage))
    content = json.loads((store / "manifest.json").read_text())
    del content["manifest_sha256"]
    content["sha256"]["train.beton"] = hashlib.sha256(_bytes(stage)).hexdigest()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (store / "manifest.json").write_text(json.dumps({**content, "manifest_sha256": digest}))
    return stage.train(env={"HARNESS_CACHE": str(cache)})


def _manifest_out(stage: Stage) -> Process:
    """A checkpoint whose manifest names a file outside its folder."""
    stopped(stage)
    (stage.run / "checkpoints" / "outside").write_text("x")
    for folder in (stage.run / "checkpoints").glob("step_*"):
        whole = json.loads((folder / "manifest.json").read_text())
        whole["files"]["../outside"] = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
        (folder / "manifest.json").write_text(json.dumps(whole))
    return stage.train()


def _data(stage: Stage, source: str) -> Process:
    overrides = (f"data.source={source}", f"data.path={stage.folder / 'data'}", "data.synthetic={}")
    return stage.train(*overrides, env={"HARNESS_CACHE": str(stage.folder / "cache")})


def _parquet_out(stage: Stage) -> Process:
    """Rows without bytes, whose path leads to a picture outside."""
    folder = stage.folder / "data"
    folder.mkdir()
    (stage.folder / "outside.png").write_bytes(_bytes(stage))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table(
        {
            "img": pa.array([{"bytes": None, "path": "../outside.png"}] * 4, image),
            "label": pa.array([0, 1, 2, 3], pa.int64()),
        }
    )
    for split in ("train", "test"):
        pq.write_table(rows, folder / f"{split}-00000-of-00001.parquet")
    return _data(stage, "parquet")


def _folder_out(stage: Stage) -> Process:
    """An image folder with a link to something that is no picture, as /etc/passwd is none."""
    for split in ("train", "test"):
        for name in ("a", "b", "c", "d"):
            (stage.folder / "data" / split / name).mkdir(parents=True)
            (stage.folder / "data" / split / name / "x.png").symlink_to("/etc/passwd")
    return _data(stage, "imagefolder")


def _archive(stage: Stage) -> Process:
    """A CIFAR-10 archive with members that lead out of it, and batches that are such pickles."""
    folder = stage.folder / "data"
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta"]
        for name in [*(f"cifar-10-batches-py/{n}" for n in names), "../outside", f"{stage.folder}/outside"]:
            member = tarfile.TarInfo(name)
            member.size = len(_bytes(stage))
            archive.addfile(member, io.BytesIO(_bytes(stage)))
    return _data(stage, "cifar10")


CASES: tuple[tuple[str, Callable[[Stage], Process]], ...] = (
    ("a pickle as model.safetensors", lambda stage: _checkpoint(stage, "model.safetensors")),
    ("a pickle as optimizer.safetensors", lambda stage: _checkpoint(stage, "optimizer.safetensors")),
    ("a pickle as ema.safetensors", lambda stage: _checkpoint(stage, "ema.safetensors")),
    ("a pickle as state.json", lambda stage: _checkpoint(stage, "state.json")),
    ("a pickle as train.beton", _beton),
    ("a checkpoint manifest that leads out", _manifest_out),
    ("a Parquet path that leads out", _parquet_out),
    ("an image folder that leads out", _folder_out),
    ("an archive of pickles that leads out", _archive),
)


@fault(
    "malice",
    "Malicious pickles, and paths that lead out",
    "a pickle that would leave a file, in place of each file of every checkpoint (the manifest made to fit), of a "
    ".beton file, and in a CIFAR-10 archive; manifests, Parquet rows, image folders and archive members that lead out: "
    "refused with code 2, nothing run, nothing written outside",
    trials=len(CASES),
    short=len(CASES),
)
def malice(stage: Stage, index: int) -> Outcome:
    title, case = CASES[index]
    process = case(stage)
    code = process.wait()
    detect = time.monotonic() - process.started_at
    wrong = said_well(process.text())
    if code != 2:
        wrong.append(f"exit code {code}: {process.text()[-300:]}")
    if (stage.folder / CANARY).exists() or (stage.folder / "outside").exists():
        wrong.append("it was run, or written outside")
    if (stage.run / "result.json").exists():
        wrong.append("trained on")
    return Outcome(not wrong, 0, detect, None, "; ".join([title, *wrong]))
