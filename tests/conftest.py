"""What all tests stand on: a cache of their own, ranks to start, and a check that no test leaves anything behind.

`$HARNESS_CACHE` is one temporary folder for the whole session, so that data is converted once; a test that must see
an empty cache takes the fixture `empty_cache`. `$HARNESS_DATA` is passed through as it is.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fork_server import LIMIT_SECONDS, ONE_THREAD, ForkServer, Process, kill_tree
from tests.leaks import Snapshot

ROOT = Path(__file__).resolve().parents[1]
_same = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", max_examples=60, **_same)
settings.register_profile("release", max_examples=1500, **_same)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Set before anything of ours is imported: tests speak to no service and to no hub."""
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for one another
    os.environ.pop("HARNESS_EXIT_CODE_FILE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine lacks, each with its reason."""
    reasons = {"gpu": _no_gpu, "cifar10": _no_cifar10, "ffcv": _no_ffcv, "slurm": _no_slurm, "browser": _no_browser}
    for name, missing in reasons.items():
        marked = [item for item in items if item.get_closest_marker(name)]
        reason = missing() if marked else None
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device, and torch finds none"


def _no_cifar10() -> str | None:
    """Asks the source itself, so that every form that it reads counts: archives, folders, Parquet, class folders."""
    from harness.data.prepare import locate
    from harness.errors import HarnessError
    from harness.files import cache_directory

    if not os.environ.get("HARNESS_DATA"):
        return "needs the real CIFAR-10: HARNESS_DATA is not set"
    none = f"needs the real CIFAR-10, and there is none in HARNESS_DATA={os.environ['HARNESS_DATA']}"
    try:
        found = locate("cifar10", download=False)
    except HarnessError:
        return none
    # A download of the user's is no help: the tests have a cache of their own.
    return none if any(file.is_relative_to(cache_directory()) for file in found.files) else None


def _no_ffcv() -> str | None:
    return None if importlib.util.find_spec("ffcv") else "needs the ffcv extra: scripts/setup.sh tells what is missing"


def _no_browser() -> str | None:
    from tests.browsers import missing_browser

    return missing_browser()


def _no_slurm() -> str | None:
    from tests.cluster.sandbox import missing_programs

    missing = missing_programs()
    return f"needs slurm-wlm and munge; not installed: {', '.join(missing)}" if missing else None


@pytest.fixture(scope="session", autouse=True)
def session_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`$HARNESS_CACHE` of the whole session, all its workers: data is converted and machines are measured once."""
    own = tmp_path_factory.getbasetemp()  # of several workers each has its own within that of the session
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "harness-cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(folder))
        yield folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `$HARNESS_CACHE` with nothing in it, of this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HARNESS_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the test that leaves a process, thread, file, setting or process group behind, and clear it away.

    Autouse and without other fixtures, so that it is set up first and looks after all others were torn down.
    """
    before = Snapshot.take(ROOT)
    yield
    leaks = before.clear_leaks()
    if leaks:
        pytest.fail("left behind by this test:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture
def free_port() -> int:
    """A TCP port that nothing listens on, below the range that outgoing connections take theirs from."""
    from harness.launch.rank_env import free_port

    return free_port()


TINY = """
seed: 0
data:
  source: synthetic
  synthetic: {train_images: 100, test_images: 37, num_classes: 4}
  loader: device
  crop_padding_px: 2
  flip: random
model:
  name: dual_branch
  args: {widths: [[4, 8], [8]], transition_widths: [8], head_width: 8, dropout: 0.2}
training: {epochs: 2, global_batch_size: 16}
optimizer: {lr: 0.05}
checkpoint: {keep_last: 10}
tracking: {wandb: disabled, log_every_steps: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def fork_server(session_cache: Path) -> Iterator[ForkServer]:
    """A warm process that forks commands and ranks, with one thread each."""
    server = ForkServer(os.environ)
    yield server
    server.close()


@pytest.fixture
def run_ranks(fork_server: ForkServer) -> RunRanks:
    """`run_ranks(n, *words, timeout=…, env=…, cwd=…)`: n connected processes on the CPU.

    The words are a script and its arguments, or "-m", "harness", "train", …. Returns code and texts as torchrun does: 1
    whatever a rank returned, and one that fails has the others sent SIGTERM. Nothing outlives the time limit, which
    fails the test with what was printed until then.
    """

    def run(
        ranks: int,
        *words: str | Path,
        timeout: float = LIMIT_SECONDS,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        from harness.launch.rank_env import free_port

        words = words[2:] if words[0] == "-m" else words
        common = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), **ONE_THREAD, **(env or {})}
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            files = {"out": Path(folder, "out"), "err": Path(folder, "err")}
            places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
            codes = _codes_of([fork_server.fork(words, cwd=cwd, env=place, **files) for place in places], timeout)
            out, err = (path.read_text(errors="replace") for path in files.values())
        if None in codes:
            pytest.fail(f"took longer than {timeout} s: {' '.join(map(str, words))}\n{out}\n{err}", pytrace=False)
        return subprocess.CompletedProcess(list(words), int(any(codes)), out, err)

    return run


def _codes_of(ranks: list[Process], timeout: float) -> list[int | None]:
    """Their exit codes; None for those that the time limit ended."""
    codes: list[int | None] = [None] * len(ranks)
    stopping, deadline = False, time.monotonic() + timeout
    while None in codes and time.monotonic() < deadline:
        time.sleep(0.01)
        codes = [rank.poll() for rank in ranks]
        running = [rank for rank, code in zip(ranks, codes, strict=True) if code is None]
        if any(codes) and not stopping:
            stopping = True
            for rank in running:
                rank.send(signal.SIGTERM)
    for rank, code in zip(ranks, codes, strict=True):
        if code is None:
            kill_tree(rank.pid)
    return codes


def run_limited(command: list[str], timeout: float, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command and end it, with every process it started, when it takes too long."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"took longer than {timeout} s: {' '.join(command)}\n{out}\n{err}", pytrace=False)
    finally:  # of a test that was interrupted too
        if process.poll() is None:
            kill_tree(process.pid)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
