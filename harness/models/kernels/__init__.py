"""Compiled passes for CPUs: `kernels.cpp`, compiled on first use and kept in the cache.

Each has a plain path in torch that is its reference. Nothing depends on them: without a compiler, or where the compiled
code is wrong, layers take their plain paths.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from harness.files import private_directory
from harness.machine import processor

FOLDER = Path(__file__).parent
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
DEFINES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
COMPILE_SECONDS = 120

_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_F, _D = ctypes.c_float, ctypes.c_double
_ARGUMENTS = {
    "moments": [_P, _N, _N, _P, _P, _I],
    "take_moments": [_P, _P, _D, _D, _P, _P, _N, _I],
    "norm_relu_drop": [_P, _P, _P, _P, _P, _P, _D, _N, _N, ctypes.c_uint64, ctypes.c_uint32, _I],
    "norm_relu_drop_sums": [_P, _P, _P, _P, _P, _D, _N, _N, _F, _P, _I],
    "norm_relu_drop_backward": [_P, _P, _P, _P, _P, _P, _P, _D, _P, _D, _N, _N, _F, _I],
    "depthwise": [_P, _P, _P, _P, _N, _N, _N, _N, _N, _I, _I],
    "depthwise_weight": [_P, _P, _P, _P, _N, _N, _N, _N, _N, _I],
}

_libraries: dict[torch.dtype, ctypes.CDLL] = {}


class KernelsUnavailable(Exception):
    """The kernels cannot be had on this machine; the message says why."""


def available(dtype: torch.dtype) -> bool:
    """Whether `call` works for tensors of this type in this process."""
    return dtype in _libraries


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel on dense CPU tensors with torch's number of threads; `open_kernels` must have succeeded."""
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    getattr(_libraries[dtype], name)(*values, torch.get_num_threads())


def open_kernels(cache_directory: Path) -> None:
    """Make the kernels available in this process, compiled once for this processor, compiler and source.

    The compiled files are kept in the cache's folder `kernels/<user id>`, which must be this user's own and nobody
    else's to write in, since what lies there is run; processes wait for one another.

    Raises:
        KernelsUnavailable: there is no C++ compiler, or it fails.
    """
    if _libraries:
        return
    compiler = _compiler()
    folder = private_directory(cache_directory / "kernels" / str(os.getuid()))
    if folder is None:
        raise KernelsUnavailable(f"no folder of ours alone under {cache_directory}")
    sources = [path.read_text(encoding="utf-8") for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])]
    version = _run([*compiler, "--version"])
    libraries = {}
    try:
        for dtype, defines in DEFINES.items():
            command = [*compiler, *FLAGS, *defines, str(FOLDER / "kernels.cpp")]
            key = hashlib.sha256("\0".join([*sources, *command, version, processor()]).encode()).hexdigest()[:24]
            path = folder / f"{key}.so"
            with FileLock(path.with_suffix(".lock")):
                libraries[dtype] = _compiled(command, path)
    except OSError as error:  # such as a full disk
        raise KernelsUnavailable(f"{folder}: {error.strerror or error}") from None
    _libraries.update(libraries)


def fingerprint() -> str:
    """What the kernels in use were made of; empty where there are none."""
    return " ".join(Path(library._name).stem for library in _libraries.values())


def close_kernels() -> None:
    """Layers take their plain paths from here on."""
    _libraries.clear()


def _compiler() -> list[str]:
    """The words of $CXX, which may have a launcher before the compiler, or what the system has."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise KernelsUnavailable(f"CXX cannot be read: {str(error).lower()}") from None
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise KernelsUnavailable(f'no program "{chosen[0]}", which CXX names')
        return chosen
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        raise KernelsUnavailable("no C++ compiler")
    return [found]


def _compiled(command: list[str], path: Path) -> ctypes.CDLL:
    """The library of a command, from the file that an earlier process made if that is whole."""
    if path.exists():
        with contextlib.suppress(KernelsUnavailable):
            return _load(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        _run([*command, "-o", str(made)])
        if not made.exists():
            raise KernelsUnavailable(f"{command[0]} made nothing")
        made.chmod(made.stat().st_mode & ~0o111)  # to be loaded, not run
        made.replace(path)
    return _load(path)


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = "takes too long" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        raise KernelsUnavailable(f"{command[0]} does not run: {reason}") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        message = next((line for line in lines if "error" in line), lines[0])
        raise KernelsUnavailable(f"{command[0]} failed: {message}")
    return result.stdout


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))  # its OpenMP is the one that torch has loaded: the same soname
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{path} does not load: {error}") from None
    return library
