"""A real SLURM for the tests of this folder, and small trainings to hand to it."""

from __future__ import annotations

import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from tests.cluster.sandbox import Sandbox
from tests.conftest import ROOT

JOB_LIMIT_SECONDS = 200.0
STEPS = 44
DIGITS = f"""
data: {{source: digits, loader: device, crop_padding_px: 2}}
model:
  name: dual_branch
  args: {{widths: [[4, 8], [8]], transition_widths: [8], head_width: 8, dropout: 0.2}}
training: {{steps: {STEPS}, global_batch_size: 64}}
optimizer: {{lr: 0.05}}
checkpoint: {{every_epochs: null, every_steps: 5, keep_last: 100, keep_best: false}}
tracking: {{wandb: disabled, log_every_steps: 1}}
"""


@dataclass(frozen=True)
class Task:
    """A job, or one task of an array, whose `job_id` is `<array>_<index>`."""

    cluster: Sandbox
    job_id: str
    run: Path
    log: Path

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, …"""
        line = self.cluster.run("scontrol", "show", "job", "-o", self.job_id)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl, in order."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [r["step"] for r in records if r["kind"] == "step"]

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Poll until the condition holds; a job that ends before it, or takes too long, fails the test."""
        deadline = time.monotonic() + JOB_LIMIT_SECONDS
        while not condition():
            state = self.facts()["JobState"]
            if time.monotonic() > deadline or state in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED", "NODE_FAIL"):
                if condition():
                    return
                pytest.fail(f"{what}: job {self.job_id} is {state}\n{self.output()}", pytrace=False)
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: step in self.steps(), f"step {step}")

    def finish(self, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for the end of the job; its facts then."""
        self.wait_for(lambda: self.facts()["JobState"] == state, f"the state {state}")
        return self.facts()

    def result(self) -> dict[str, Any]:
        return json.loads((self.run / "result.json").read_text())

    def weights(self, step: int = STEPS) -> bytes:
        return (self.run / "checkpoints" / f"step_{step}" / "model.safetensors").read_bytes()

    def starts(self) -> list[int]:
        """The step that each start resumed from."""
        file = self.run / "provenance.json"
        return [start["from_step"] for start in json.loads(file.read_text())["starts"]] if file.exists() else []


Submit = Callable[..., list[Task]]


@contextmanager
def submitting(cluster: Sandbox, folder: Path) -> Iterator[Submit]:
    """In a folder with a recipe `digits.yaml`, `submit("submit", "digits.yaml", …)`: the tasks that a command submits.

    The code that jobs run is that of this repository. Jobs that are left are cancelled.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.chdir(folder)
        (folder / "digits.yaml").write_text(DIGITS)
        tasks: list[Task] = []

        def submit(*words: str) -> list[Task]:
            with redirect_stdout(io.StringIO()) as printed:
                assert main(words) == 0
            pattern = r"^run directory (.*)\nlog (.*)$"
            places = re.findall(pattern, printed.getvalue(), re.MULTILINE)
            new = [Task(cluster, Path(log).stem, Path(run), Path(log)) for run, log in places]
            tasks.extend(new)
            return new

        yield submit
        for task in tasks:
            cluster.run("scancel", "--quiet", task.job_id, check=False)
        deadline = time.monotonic() + 30
        while cluster.run("squeue", "-h", check=False).strip():  # they must not write into a folder that goes
            assert time.monotonic() < deadline, cluster.run("squeue")
            time.sleep(0.1)


@contextmanager
def own_cluster(folder: Path, **settings: Any) -> Iterator[tuple[Sandbox, Submit]]:
    """A cluster of one test, whose daemons it may kill."""
    # Not pytest's folder: no other user may enter it, and munge wants its socket within the reach of all.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as state,
        Sandbox(Path(state), **settings) as cluster,
        submitting(cluster, folder) as submit,
    ):
        yield cluster, submit


@pytest.fixture(scope="session")
def cluster() -> Iterator[Sandbox]:
    """Two nodes of four CPUs (whatever the machine has) and two fake GPUs each."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Sandbox(Path(folder), cpus=4, gpus=2) as sandbox:
        yield sandbox


@pytest.fixture
def submit(cluster: Sandbox, tmp_path: Path) -> Iterator[Submit]:
    with submitting(cluster, tmp_path) as found:
        yield found


@pytest.fixture(scope="session")
def undisturbed(cluster: Sandbox, tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Task:
    """A job on two nodes that was left alone."""
    with submitting(cluster, tmp_path_factory.mktemp("undisturbed")) as submit:
        (task,) = submit("submit", "digits.yaml", "--nodes", "2", "--time", "10")
        task.finish()
    return task
