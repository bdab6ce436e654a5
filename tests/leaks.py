"""What a test may leave behind: nothing. Used by conftest.py around every test."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Set by libraries when they are first imported or used; for the life of the process, and harmless to later tests.
LIBRARY_VARIABLES = {
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",  # OpenMP
    "GOMP_SPINCOUNT",  # the command's own, for the life of its process
    "KMP_DUPLICATE_LIB_OK",
    "QT_QPA_PLATFORM_PLUGIN_PATH",  # opencv, which ffcv imports
    "QT_QPA_FONTDIR",
    "LD_LIBRARY_PATH",
    "TORCHINDUCTOR_CACHE_DIR",  # torch.compile
    "TRITON_CACHE_DIR",
    "ACCELERATE_MIXED_PRECISION",  # Accelerator() notes its precision there
}
# Helpers that Python and torch start once and keep for the life of the process.
LIBRARY_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "compile_worker", "loky")
ROOT_FILES = (".coverage", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache", "__pycache__")
GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Snapshot:
    """The state of the process, before a test."""

    root: Path
    environment: dict[str, str]
    directory: str
    files: frozenset[str]
    threads: frozenset[int]
    children: frozenset[int]
    torch: dict[str, Any] | None

    @classmethod
    def take(cls, root: Path) -> Snapshot:
        """The state now; `root` is the folder in which no file may appear."""
        return cls(
            root=root,
            environment=dict(os.environ),
            directory=os.getcwd(),
            files=_files(root),
            threads=frozenset(t.ident for t in threading.enumerate() if t.ident is not None),
            children=frozenset(child.pid for child in psutil.Process().children(recursive=True)),
            torch=_torch_state(),
        )

    def clear_leaks(self) -> list[str]:
        """What differs now, in words; it is put back as it was, so that only one test fails for it."""
        return [
            *self._environment(),
            *self._directory(),
            *self._files(),
            *self._threads(),
            *self._children(),
            *self._process_group(),
            *self._torch(),
        ]

    def _environment(self) -> list[str]:
        names = (os.environ.keys() | self.environment.keys()) - LIBRARY_VARIABLES
        changed = sorted(name for name in names if os.environ.get(name) != self.environment.get(name))
        found = [f"environment variable {n}: {self.environment.get(n)!r} → {os.environ.get(n)!r}" for n in changed]
        for name in changed:
            if name in self.environment:
                os.environ[name] = self.environment[name]
            else:
                del os.environ[name]
        return found

    def _directory(self) -> list[str]:
        if os.getcwd() == self.directory:
            return []
        found = [f"working directory: {os.getcwd()}"]
        os.chdir(self.directory)
        return found

    def _files(self) -> list[str]:
        return [f"file in the repository: {name}" for name in sorted(_files(self.root) - self.files)]

    def _threads(self) -> list[str]:
        deadline = time.monotonic() + GRACE_SECONDS
        while alive := [
            t for t in threading.enumerate() if not t.daemon and t.is_alive() and t.ident not in self.threads
        ]:
            if time.monotonic() > deadline:
                return [f"thread {thread.name}" for thread in alive]
            time.sleep(0.02)
        return []

    def _children(self) -> list[str]:
        deadline = time.monotonic() + GRACE_SECONDS
        while alive := [p for p in psutil.Process().children(recursive=True) if self._is_leaked(p)]:
            if time.monotonic() > deadline:
                found = [f"process {_command(process)}" for process in alive]
                for process in alive:
                    process.kill()
                psutil.wait_procs(alive, timeout=GRACE_SECONDS)
                return found
            time.sleep(0.02)
        return []

    def _is_leaked(self, process: psutil.Process) -> bool:
        command = _command(process)
        return process.pid not in self.children and bool(command) and not any(w in command for w in LIBRARY_PROCESSES)

    def _process_group(self) -> list[str]:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return []
        distributed.destroy_process_group()
        return ["a process group of torch.distributed"]

    def _torch(self) -> list[str]:
        _forget_accelerator()
        now = _torch_state()
        if self.torch is None or now is None:
            return []
        found = [f"torch {name}: {old} → {now[name]}" for name, old in self.torch.items() if now[name] != old]
        if found:
            _restore_torch(self.torch)
        return found


def _files(root: Path) -> frozenset[str]:
    return frozenset(name for name in os.listdir(root) if not name.startswith(ROOT_FILES))


def _command(process: psutil.Process) -> str:
    """The command line, empty for a process that has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _torch_state() -> dict[str, Any] | None:
    """The settings of torch that would change what later tests compute; None before torch is imported."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return None
    return {
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "gradients": torch.is_grad_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }


def _restore_torch(state: dict[str, Any]) -> None:
    torch = sys.modules["torch"]
    torch.set_default_dtype(state["default dtype"])
    torch.set_num_threads(state["number of threads"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.backends.cudnn.deterministic = state["cudnn.deterministic"]
    torch.backends.cudnn.benchmark = state["cudnn.benchmark"]
    torch.set_grad_enabled(state["gradients"])
    torch.set_float32_matmul_precision(state["float32 matmul precision"])


def _forget_accelerator() -> None:
    """Accelerate keeps the first Accelerator's settings for the whole process; the next test starts without them."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
