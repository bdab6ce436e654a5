"""Disks that are full or fail; files that were cut, changed, put where they do not belong or made to do harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.check import contents, differences, refused, restarted, says_why, wait_for_step
from tests.faults.fault import fault
from tests.faults.inputs import changed, manifest_of, paths_of, signed
from tests.faults.runs import STEPS, STOP_AT, Stage, remount
from tests.fork_server import Process

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")


def broken_off(stage: Stage, process: Process) -> None:
    """See that a training ends for want of a disk, and says so."""
    code = stage.end(process)
    assert code in (1, 2), f"exit code {code}: {process.text()[-500:]}"
    says_why(process)


@fault("full-run-directory", trials=16)
def full_run_directory(stage: Stage, index: int) -> None:
    """Disk full under the run directory: the run directory lies on a tmpfs of 4 to 120 kB (as root), which is enlarged
    before the restart."""
    kilobytes = stage.rng.randrange(4, 120, 4)
    stage.notes.append(f"{kilobytes} kB")
    disk = stage.small_disk("disk", kilobytes)
    stage.run = disk / "run"
    broken_off(stage, stage.train())
    remount(disk, "size=64m")
    restarted(stage)


@fault("full-cache", trials=8)
def full_cache(stage: Stage, index: int) -> None:
    """Disk full under $HARNESS_CACHE: an empty cache on a tmpfs of 4 to 400 kB (as root), which is enlarged before the
    restart."""
    kilobytes = stage.rng.randrange(4, 400, 4)
    stage.notes.append(f"{kilobytes} kB")
    disk = stage.small_disk("disk", kilobytes)
    environment = {"HARNESS_CACHE": str(disk / "cache")}
    refused(stage, stage.train(env=environment), code=1)
    assert not stage.run.exists()
    remount(disk, "size=64m")
    restarted(stage, env=environment)


@fault("failing-disk", trials=48, ordinary=True)
def failing_disk(stage: Stage, index: int) -> None:
    """ENOSPC, EIO, EDQUOT or EROFS from one call: in the process itself: one open, fsync, rename, mkdir or remove under
    the run directory fails, each in turn."""
    lines = stage.touches("/run", "run")
    # The files of the start and the first save, one by one; then any.
    number = index + 1 if index < 24 else stage.rng.randrange(1, len(lines) + 1)
    error = ERRORS[index % len(ERRORS)]
    stage.notes.append(f"{error} from touch {number}, {lines[number - 1]}")
    process = stage.train(faults=[{"kind": "files", "under": "/run", "do": [[number, error]]}])
    if process.wait():  # dropping an old checkpoint may fail: nothing depends on it
        broken_off(stage, process)
    restarted(stage)


@fault("read-only-run-directory", trials=6, most_steps_lost=0)
def read_only(stage: Stage, index: int) -> None:
    """Read-only run directory: a run on a tmpfs is stopped by SIGTERM, the tmpfs is remounted read-only (as root) and
    the run resumed: code 2, nothing changed; then it is made writable and resumed again."""
    disk = stage.small_disk("disk", 8192)
    stage.run = disk / "run"
    step = stage.rng.randrange(1, 18)
    stage.notes.append(f"at step {step}")
    assert stage.train(faults=[{"kind": "step", "step": step, "action": "SIGTERM"}]).wait() == 75
    before = contents(stage.run)
    remount(disk, "ro")
    refused(stage, stage.train())
    assert contents(stage.run) == before
    remount(disk, "rw")
    restarted(stage, lost_from=step)


def damage(stage: Stage, path: Path) -> None:
    """Cut a file at a random offset or flip one of its bits."""
    whole, rng = path.read_bytes(), stage.rng
    at, bit = rng.randrange(len(whole)), rng.randrange(8)
    if rng.random() < 0.5:
        path.write_bytes(whole[:at])
        stage.notes.append(f"{path.name} cut at {at} of {len(whole)}")
    else:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
        stage.notes.append(f"{path.name} bit {bit} of byte {at} flipped")


@fault("damaged-checkpoint", trials=60, ordinary=True)
def damaged_checkpoint(stage: Stage, index: int) -> None:
    """Checkpoint file cut or a bit flipped: one file of the newest checkpoint, at a random offset; it must be named and
    set aside, and the one before used."""
    stage.stopped()
    file = stage.rng.choice(sorted((stage.run / "checkpoints" / f"step_{STOP_AT}").iterdir()))
    damage(stage, file)
    process = stage.train()
    while "broken checkpoint" not in process.text() and process.poll() is None:
        time.sleep(0.005)
    stage.detect = time.monotonic() - process.started_at
    restarted(stage, start=lambda: process, lost_from=STOP_AT)
    if file.name != "manifest.json":  # its spacing and its copy of the step are no one's loss
        assert "broken checkpoint" in process.text()
        assert any((stage.run / "checkpoints").glob("broken_*"))


@fault("no-checkpoint-left", trials=12)
def no_checkpoint_left(stage: Stage, index: int) -> None:
    """Every checkpoint damaged: one file of each checkpoint cut or a bit flipped: refused with code 2, the files keep
    their content."""
    stage.stopped()
    for path in sorted((stage.run / "checkpoints").iterdir()):
        damage(stage, stage.rng.choice(sorted(path.glob("*.safetensors"))))
    before = sorted(contents(stage.run).values())
    refused(stage, stage.train())
    assert sorted(contents(stage.run).values()) == before


@fault("damaged-run-file", trials=30)
def damaged_run_file(stage: Stage, index: int) -> None:
    """recipe.yaml, provenance.json or metrics.jsonl cut or a bit flipped: at a random offset of one of them in a
    stopped run: either refused without a traceback, with nothing changed, or resumed to the same weights."""
    stage.stopped()
    damage(stage, stage.run / ("recipe.yaml", "provenance.json", "metrics.jsonl")[index % 3])
    before = contents(stage.run)
    process = stage.train()
    if stage.end(process) != 0:
        refused(stage, process)
        assert contents(stage.run) == before
    else:
        mine, wanted = (contents(run / f"checkpoints/step_{STEPS}") for run in (stage.run, stage.reference()))
        assert [n for n in wanted if n.endswith(".safetensors") and mine.get(n) != wanted[n]] == [], "other weights"


def own_cache(stage: Stage) -> tuple[Path, Path, dict[str, str]]:
    """A copy of the cache: its folder, that of the converted data, and the variable that leads to it."""
    cache = stage.folder / "cache"
    shutil.copytree(stage.cache, cache)
    (store,) = (p for p in (cache / "data").iterdir() if p.is_dir())
    return cache, store, {"HARNESS_CACHE": str(cache)}


@fault("damaged-beton", trials=20, ordinary=True)
def damaged_beton(stage: Stage, index: int) -> None:
    """.beton file or its manifest cut or a bit flipped: at a random offset, before the first start: refused with code 2
    and nothing changed; after `harness data prepare --force` the training ends as undisturbed."""
    cache, store, environment = own_cache(stage)
    damage(stage, stage.rng.choice(sorted(store.iterdir())))
    before = contents(cache)
    refused(stage, stage.train(env=environment))
    assert contents(cache) == before
    assert not stage.run.exists()
    prepare = stage.harness("data", "prepare", str(stage.recipe), "--force", env=environment)
    assert prepare.wait() == 0, prepare.text()[-300:]
    restarted(stage, env=environment)


# What is put into checkpoints/: links by their targets, folders (None) and files by their content.
STRAYS: dict[str, dict[str, Path | bytes | None]] = {
    "dangling": {"latest": Path("step_gone"), "step_999": Path("/nonexistent/step_999")},
    "stale": {"latest": Path("step_7"), "step_998": Path("step_7")},
    "files": {"step_997": b"a file", "notes.txt": b"mine", "step_x": None, "step_": None},
    "odd numbers": {"step_²": None, "step_٣": None, "step_00099": None},
    "empty": {"step_996": None, f"step_{'9' * 30}": None},
    "half": {".step_12.999.tmp": None, ".step_12.999.tmp/model.safetensors": bytes(100), ".step_9.998.old.tmp": None},
    "loop": {"step_995": Path("step_995"), "step_994": Path()},
}


@fault("stray-entries", trials=len(STRAYS) * 2, short=2)
def stray_entries(stage: Stage, index: int) -> None:
    """Dangling or stale links and stray files in checkpoints/: put into a stopped run: links to nothing, to themselves,
    to another checkpoint, files and folders with a checkpoint's name, odd numbers, half-written saves."""
    stage.stopped()
    kind = list(STRAYS)[index % len(STRAYS)]
    stage.notes.append(kind)
    for name, what in STRAYS[kind].items():
        path = stage.run / "checkpoints" / name
        if isinstance(what, Path):
            path.symlink_to(what)
        elif isinstance(what, bytes):
            path.write_bytes(what)
        else:
            path.mkdir(parents=True)
    restarted(stage, lost_from=STOP_AT)


@fault("two-writers", trials=10, ordinary=True, most_steps_lost=0)
def two_writers(stage: Stage, index: int) -> None:
    """A second process in the same run directory: the first stands still at a random step (it sends itself SIGSTOP),
    the same command once more is refused with code 2, and the first, sent SIGCONT, ends as undisturbed."""
    step = stage.rng.randrange(2, STEPS + 1)
    first = stage.train(faults=[{"kind": "step", "step": step, "action": "SIGSTOP"}])
    wait_for_step(stage, first, step - 1)
    second = stage.train()
    refused(stage, second)
    assert "another process is training" in second.text()
    while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:  # SIGCONT before SIGSTOP would be lost
        time.sleep(0.01)
    first.send(signal.SIGCONT)
    assert first.wait() == 0, first.text()[-300:]
    assert differences(stage.run, stage.reference()) == []


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put something in place of a checkpoint's file, and make the manifest fit."""
    (folder / name).write_bytes(content)
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    (folder / "manifest.json").write_text(manifest_of(files))


@fault("forged-state", trials=24)
def forged_state(stage: Stage, index: int) -> None:
    """A checkpoint with a forged state.json: one entry of every checkpoint's state.json replaced or left out at random
    and the manifest made to fit: refused with code 2 and the checkpoints unchanged in content, or resumed."""
    stage.stopped()
    checkpoints = stage.run / "checkpoints"
    for folder in checkpoints.iterdir():
        state = json.loads((folder / "state.json").read_text())
        way = stage.rng.choice([w for w in paths_of(state) if w])
        value = stage.rng.choice((None, -1, 10**9, 1.5, "x", [], {}, [[]], {"step": {}}, True, 10**300))
        forge(folder, "state.json", json.dumps(changed(state, [(way, value)])).encode())
        stage.notes.append(f"{folder.name} {'.'.join(map(str, way))} = {str(value)[:12]}")
    before = sorted(contents(checkpoints).values())
    process = stage.train()
    if stage.end(process) in (0, 3):  # other numbers may train on, or diverge
        assert "Traceback" not in process.text(), process.text()[-400:]
    else:
        refused(stage, process)
        assert sorted(contents(checkpoints).values()) == before


class Bad:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._canary}",)


def _bad(stage: Stage) -> bytes:
    return pickle.dumps(Bad(stage.folder / "canary"))


def _checkpoint(stage: Stage, name: str) -> Process:
    stage.stopped()
    for folder in (stage.run / "checkpoints").iterdir():
        forge(folder, name, _bad(stage))
    return stage.train()


def _beton(stage: Stage) -> Process:
    _, store, environment = own_cache(stage)
    (store / "train.beton").write_bytes(_bad(stage))
    content = json.loads((store / "manifest.json").read_text())
    del content["manifest_sha256"]
    content["sha256"]["train.beton"] = hashlib.sha256(_bad(stage)).hexdigest()
    (store / "manifest.json").write_text(signed(content))
    return stage.train(env=environment)


def _manifest_out(stage: Stage) -> Process:
    stage.stopped()
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
    (stage.folder / "data").mkdir()
    (stage.folder / "outside.png").write_bytes(_bad(stage))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "../outside.png"}] * 4, image)
    for split in ("train", "test"):
        rows = pa.table({"img": images, "label": pa.array([0, 1, 2, 3], pa.int64())})
        pq.write_table(rows, stage.folder / "data" / f"{split}-00000-of-00001.parquet")
    return _data(stage, "parquet")


def _folder_out(stage: Stage) -> Process:
    """Links to something that is no picture."""
    for path in (stage.folder / "data" / split / name for split in ("train", "test") for name in "abcd"):
        path.mkdir(parents=True)
        (path / "x.png").symlink_to("/etc/passwd")
    return _data(stage, "imagefolder")


def _archive(stage: Stage) -> Process:
    """Members that lead out, and batches that are such pickles."""
    (stage.folder / "data").mkdir()
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]
    with tarfile.open(stage.folder / "data" / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in [*(f"cifar-10-batches-py/{n}" for n in names), "../outside", f"{stage.folder}/outside"]:
            member = tarfile.TarInfo(name)
            member.size = len(_bad(stage))
            archive.addfile(member, io.BytesIO(_bad(stage)))
    return _data(stage, "cifar10")


CASES: dict[str, Callable[[Stage], Process]] = {
    "a pickle as model.safetensors": lambda stage: _checkpoint(stage, "model.safetensors"),
    "a pickle as optimizer.safetensors": lambda stage: _checkpoint(stage, "optimizer.safetensors"),
    "a pickle as ema.safetensors": lambda stage: _checkpoint(stage, "ema.safetensors"),
    "a pickle as state.json": lambda stage: _checkpoint(stage, "state.json"),
    "a pickle as train.beton": _beton,
    "a checkpoint manifest that leads out": _manifest_out,
    "a Parquet path that leads out": _parquet_out,
    "an image folder that leads out": _folder_out,
    "an archive of pickles that leads out": _archive,
}


@fault("malice", trials=len(CASES), short=len(CASES), ordinary=True)
def malice(stage: Stage, index: int) -> None:
    """Malicious pickles, and paths that lead out: a pickle that would leave a file, in place of each file of every
    checkpoint (the manifest made to fit), of a .beton file, and in a CIFAR-10 archive; manifests, Parquet rows, image
    folders and archive members that lead out: refused with code 2, nothing run, nothing written outside."""
    title, case = list(CASES.items())[index]
    stage.notes.append(title)
    refused(stage, case(stage))
    assert not (stage.folder / "canary").exists(), "it was run"
    assert not (stage.folder / "outside").exists(), "it was written outside"
    assert not (stage.run / "result.json").exists(), "it was trained with"
