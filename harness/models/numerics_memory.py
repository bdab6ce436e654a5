"""Verdicts of the numerics check, remembered for each machine, library versions and settings."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path

import torch

from harness.errors import HarnessError
from harness.files import write_json
from harness.machine import processor
from harness.models.kernel_check import Fault
from harness.models.kernels.compiled import fingerprint

CHECK_VERSION = 1  # raise it when the check itself changes, so that old verdicts are not used
# What can change the choice of a kernel, apart from the arguments.
_ENVIRONMENT = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY")


class Memory:
    """Faults by signature, in `<cache_directory>/numerics/<key>.json`.

    A file that is missing, broken or of another machine is no verdict: the check runs again. A directory that
    cannot be written only means that nothing is remembered.
    """

    def __init__(
        self, cache_directory: Path | None, *, device: torch.device, precision: str, memory_format: str
    ) -> None:
        self.machine = machine(device, precision=precision, memory_format=memory_format)
        self.path: Path | None = None
        if cache_directory is not None:
            text = json.dumps(self.machine, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:24]
            self.path = Path(cache_directory) / "numerics" / f"{key}.json"
        self._verdicts = self._read()
        self._changed = False

    def get(self, signature: str) -> list[Fault] | None:
        """The faults found earlier (empty when right), or None when it was not checked yet."""
        return self._verdicts.get(signature)

    def put(self, signature: str, faults: list[Fault]) -> None:
        self._verdicts[signature] = faults
        self._changed = True

    def save(self) -> None:
        """Write atomically; of two processes that write at once, the last one's verdicts stay."""
        if self.path is None or not self._changed:
            return
        verdicts = {
            signature: [[fault.what, _to_json(fault.relative_error)] for fault in faults]
            for signature, faults in {**self._read(), **self._verdicts}.items()
        }
        with contextlib.suppress(OSError, HarnessError):  # a cache that cannot be written remembers nothing
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"machine": self.machine, "verdicts": verdicts})

    def _read(self) -> dict[str, list[Fault]]:
        if self.path is None:
            return {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["machine"] != self.machine:
                return {}
            return {
                str(signature): [Fault(str(what), _from_json(error)) for what, error in faults]
                for signature, faults in stored["verdicts"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _to_json(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _from_json(error: float | None) -> float:
    return math.inf if error is None else float(error)


def machine(device: torch.device, *, precision: str, memory_format: str) -> dict[str, str]:
    """What a verdict depends on besides the layer: hardware, libraries, threads, settings."""
    described = {
        "check": str(CHECK_VERSION),
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "device": device.type,
        "precision": precision,
        "memory_format": memory_format,
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["processor"] = f"{properties.name} {properties.major}.{properties.minor}"
        described["cuda"] = f"{torch.version.cuda} {torch.backends.cudnn.version()}"
        described["cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
    else:
        described["processor"] = processor()
        described["instructions"] = torch.backends.cpu.get_cpu_capability()
        described["threads"] = str(torch.get_num_threads())
        described["kernels"] = fingerprint()
        described["onednn"] = str(torch.backends.mkldnn.enabled)
    return described
