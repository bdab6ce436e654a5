"""Weights & Biases in trouble: the training ends with code 0 and a whole metrics.jsonl, after a bounded wait."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults.disks import small_disk

from harness.launch.rank_env import free_port
from tests.faults.check import differences, wait_for_step
from tests.faults.fault import Outcome, fault
from tests.faults.runs import Process, Stage
from tests.faults.wandb_server import SlowWay, WandbServer, environment

LENGTH = ("training.epochs=12",)
ONLINE = (*LENGTH, "tracking.wandb=online")
# The longest that W&B may hold up a training: the client is given a minute to begin and a minute to end.
WAIT_SECONDS = 180.0


def _finish(stage: Stage, process: Process, reference: Path, note: str = "", fault_at: float | None = None) -> Outcome:
    """The run must end as undisturbed, apart from W&B's own folder."""
    code = process.wait(WAIT_SECONDS)
    seconds = time.monotonic() - (fault_at or process.started_at)
    wrong = [f"exit code {code}: {process.text()[-500:]}"] if code else differences(stage.run, reference)
    if "Traceback" in process.text():
        wrong.append("a traceback: " + process.text()[-500:])
    warned = next((line.strip() for line in process.text().splitlines() if "W&B" in line), "no warning")
    return Outcome(not wrong, 0, seconds, None, "; ".join(filter(None, [note, warned[:160], *wrong])))


@fault(
    "wandb-down-at-start",
    "W&B server down at start",
    "nothing listens on its port; detected: when the training has ended",
    trials=2,
    short=0,
    load="waiting",
)
def down_at_start(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*LENGTH)
    return _finish(stage, stage.train(*ONLINE, env=environment(free_port())), reference)


@fault(
    "wandb-killed",
    "W&B server killed in the middle",
    "SIGKILL to the server at a random step; detected: when the training has ended",
    trials=2,
    short=0,
    load="waiting",
)
def killed(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*LENGTH)
    server = WandbServer(stage.folder / "server", stage.log())
    try:
        process = stage.train(*ONLINE, env=environment(server.port))
        step = wait_for_step(stage, process, stage.rng.randrange(1, 60))
    finally:
        server.kill()
    return _finish(stage, process, reference, f"at step {step}", time.monotonic())


@fault(
    "wandb-down-at-finish",
    "W&B server down at finish",
    "SIGKILL to the server when the last step is done; detected: when the training has ended",
    trials=2,
    short=0,
    load="waiting",
)
def down_at_finish(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*LENGTH)
    server = WandbServer(stage.folder / "server", stage.log())
    try:
        process = stage.train(*ONLINE, env=environment(server.port))
        wait_for_step(stage, process, 84)
    finally:
        server.kill()
    return _finish(stage, process, reference, "", time.monotonic())


@fault(
    "wandb-slow",
    "W&B server slow",
    "each piece of data to and from it is held back by 0.5 to 2 s",
    trials=2,
    short=0,
    load="waiting",
)
def slow(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*LENGTH)
    server = WandbServer(stage.folder / "server", stage.log())
    seconds = stage.rng.uniform(0.5, 2)
    way = SlowWay(server.port, seconds)
    try:
        return _finish(stage, stage.train(*ONLINE, env=environment(way.port)), reference, f"{seconds:.1f} s")
    finally:
        way.close()
        server.kill()


@fault(
    "wandb-server-disk-full",
    "Disk full under the W&B server's folder",
    "the server's folder lies on a tmpfs of 4 MB (as root) that is filled up when the training begins",
    trials=2,
    short=0,
    load="waiting",
)
def server_disk_full(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*LENGTH)
    disk = small_disk(stage, "server", 4096)
    server = WandbServer(disk, stage.log())
    try:
        _fill(disk)
        return _finish(stage, stage.train(*ONLINE, env=environment(server.port)), reference)
    finally:
        server.kill()


@fault(
    "wandb-folder-full",
    "Disk full under the run's wandb/ folder",
    "a stopped run goes on with W&B offline and a tmpfs of 8 to 64 kB (as root) as its wandb/ folder",
    trials=2,
    short=0,
    load="waiting",
)
def folder_full(stage: Stage, index: int) -> Outcome:
    reference = stage.reference(*LENGTH)
    step = {"kind": "step", "step": 5, "action": "SIGTERM"}
    assert stage.train(*LENGTH, faults=[step]).wait() == 75
    kilobytes = stage.rng.randrange(8, 64, 4)
    disk = small_disk(stage, "wandb", kilobytes)
    (stage.run / "wandb").symlink_to(disk)
    process = stage.train(*LENGTH, "tracking.wandb=offline", env={"WANDB_MODE": "offline"})
    return _finish(stage, process, reference, f"{kilobytes} kB")


def _fill(disk: Path) -> None:
    try:
        with (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
    except OSError:
        return
