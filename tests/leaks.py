"""What a test may leave behind: nothing. Used by conftest.py around every test."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
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
    files: set[str]
    threads: set[threading.Thread]
    children: set[int]
    torch: dict[str, Any]

    @classmethod
    def take(cls, root: Path) -> Snapshot:
        """The state now; `root` is the folder in which no file may appear."""
        children = {child.pid for child in psutil.Process().children(recursive=True)}
        threads = set(threading.enumerate())
        return cls(root, dict(os.environ), os.getcwd(), _files(root), threads, children, _torch_state())

    def clear_leaks(self) -> list[str]:
        """What differs now, in words; it is put back as it was, so that only one test fails for it."""
        found = []
        for name in sorted((os.environ.keys() | self.environment.keys()) - LIBRARY_VARIABLES):
            before, now = self.environment.get(name), os.environ.get(name)
            if now != before:
                found.append(f"environment variable {name}: {before!r} → {now!r}")
                os.environ.pop(name, None)
                os.environ.update({} if before is None else {name: before})
        if os.getcwd() != self.directory:
            found.append(f"working directory: {os.getcwd()}")
            os.chdir(self.directory)
        found += [f"file in the repository: {name}" for name in sorted(_files(self.root) - self.files)]
        found += [f"thread {thread.name}" for thread in _remaining(self._threads)]
        processes = _remaining(self._children)
        found += [f"process {_command(process)}" for process in processes]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=GRACE_SECONDS)
        return found + self._torch()

    def _threads(self) -> list[threading.Thread]:
        return [t for t in threading.enumerate() if not t.daemon and t.is_alive() and t not in self.threads]

    def _children(self) -> list[psutil.Process]:
        new = [process for process in psutil.Process().children(recursive=True) if process.pid not in self.children]
        return [p for p in new if (command := _command(p)) and not any(word in command for word in LIBRARY_PROCESSES)]

    def _torch(self) -> list[str]:
        found = []
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
            found.append("a process group of torch.distributed")
        if state := sys.modules.get("accelerate.state"):  # it keeps the first Accelerator's settings for good
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()
        now = _torch_state() if self.torch else {}
        for name, value in now.items():
            if value != self.torch[name]:
                found.append(f"torch {name}: {self.torch[name]} → {value}")
                _torch_settings()[name][1](self.torch[name])
        return found


def _remaining(look: Callable[[], list[Any]]) -> list[Any]:
    """What is still there after a moment."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (alive := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _files(root: Path) -> set[str]:
    return {name for name in os.listdir(root) if not name.startswith(ROOT_FILES)}


def _command(process: psutil.Process) -> str:
    """The command line, empty for a process that has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _torch_settings() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """The settings of torch that would change what later tests compute, each with how to read and to set it."""
    torch = sys.modules["torch"]
    cudnn = torch.backends.cudnn
    return {
        "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "number of threads": (torch.get_num_threads, torch.set_num_threads),
        "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
        "cudnn.deterministic": (lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value)),
        "cudnn.benchmark": (lambda: cudnn.benchmark, lambda value: setattr(cudnn, "benchmark", value)),
        "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
        "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    }


def _torch_state() -> dict[str, Any]:
    """Empty before torch is imported."""
    imported = hasattr(sys.modules.get("torch"), "get_num_threads")
    return {name: read() for name, (read, _) in _torch_settings().items()} if imported else {}
