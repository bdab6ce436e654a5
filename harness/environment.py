"""Environment variables of the libraries: the recipe decides what is computed, the launcher only where.

Accelerate takes settings from variables that outrank its arguments, torch and timm read some that change arithmetic.
Accelerate's are hidden from it while a run lasts; the others, which are read at import, are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from harness.errors import HarnessError, ManyErrors

# Everything of Accelerate's with these prefixes is hidden, so also what later versions add ...
_HIDDEN = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "XLA_USE_BF16", "XLA_DOWNCAST_BF16")
# ... but for what decides where and how loud, not what.
_LAUNCHERS = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL")
_NEUTRAL = (
    "",
    "no",
    "none",
    "false",
    "0",
    "off",
    "default",
)  # what `accelerate launch` sets where nothing is asked for
_DISTRIBUTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# Read by torch, oneDNN, cuBLAS or timm at import; with the values that change nothing.
_ARITHMETIC = {
    "NVIDIA_TF32_OVERRIDE": (),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("0",),
    "HIPBLASLT_ALLOW_TF32": ("0",),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("strict",),
    "DNNL_DEFAULT_FPMATH_MODE": ("strict",),
    "TORCHDYNAMO_DISABLE": ("0",),  # training.compile would be ignored
    "TORCH_COMPILE_DISABLE": ("0",),
    "TORCH_COMPILE_OVERRIDE_BACKENDS": (),
    "TORCH_COMPILE_OVERRIDE_DYNAMO_CONFIGS": (),
    "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS": (),
    "TORCHDYNAMO_SUPPRESS_ERRORS": ("0",),
    "TORCHINDUCTOR_USE_FAST_MATH": ("0",),
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": ("0",),
    "TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG": ("off",),
    "TIMM_FUSED_ATTN": ("1",),
    "TIMM_REENTRANT_CKPT": ("0", "false", "no", "off"),
    "TIMM_USE_SCIPY_INTERP": ("0",),
    "TIMM_USE_NAFLEXVIT": ("false",),
    "TIMM_USE_NAFLEX": ("0",),
    "FORK_LAST3": (),  # fastvit
}
# How MPI and srun count ranks; Accelerate reads them, and the harness by WORLD_SIZE alone.
_OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")
# What else may change speed or the last bits goes into provenance.json; none of it holds a secret.
_NOTED = (
    *_HIDDEN,
    *("TORCH", "PYTORCH_", "TIMM_", "CUBLAS_", "CUDNN_", "ONEDNN_", "DNNL_", "MKL_", "OMP_", "GOMP_", "KMP_"),
    *("ATEN_", "NCCL_", "GLOO_", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES"),
)


def flag(name: str) -> bool:
    """Whether a variable is switched on, by the words that Accelerate takes.

    Raises:
        HarnessError: it is neither on nor off.
    """
    text = os.environ.get(name, "").strip().lower()
    if text in ("1", "true", "yes", "y", "t", "on"):
        return True
    if text in ("", "0", "false", "no", "n", "f", "off"):
        return False
    raise HarnessError(f'{name} is "{text}"', where="environment", hint=f"Set {name}=true, or unset it.")


def whole_number(name: str, default: int, *, at_least: int = 0) -> int:
    """The number in a variable, `default` where it is unset or empty.

    Raises:
        HarnessError: it is no number, or too small.
    """
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < at_least:
        raise HarnessError(
            f'{name} must be a whole number ≥ {at_least}, it is "{text}"',
            where="environment",
            hint="Unset it, or start ranks with ./launch.sh, accelerate launch, torchrun or harness submit.",
        )
    return int(text)


def refuse_arithmetic() -> None:
    """See that no variable asks for another way of training than the recipe's.

    Raises:
        HarnessError: all that do, by name.
    """
    errors = [
        HarnessError(
            f"{name}={os.environ[name]} asks for {what}, and the harness trains by DDP alone",
            hint=f"Unset {name}, or choose another distributed type by `accelerate config`.",
        )
        for name, what in _DISTRIBUTED.items()
        if os.environ.get(name, "").lower() not in _NEUTRAL
    ]
    errors += [
        HarnessError(
            f"{name}={os.environ[name]} changes the arithmetic, which the recipe decides",
            hint=f"Unset {name}; see training.precision and training.compile.",
        )
        for name, harmless in _ARITHMETIC.items()
        if os.environ.get(name, "") and os.environ[name].lower() not in harmless
    ]
    errors += [
        HarnessError(
            f"{name}SIZE={os.environ[name + 'SIZE']} says that there are several ranks, and WORLD_SIZE is not set",
            hint="Start ranks with ./launch.sh, accelerate launch, torchrun, srun or harness submit, not with mpirun.",
        )
        for name in _OTHER_LAUNCHERS
        if os.environ.get(f"{name}SIZE", "1") not in ("", "0", "1") and not os.environ.get("WORLD_SIZE")
    ]
    flags = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
    checks: list[Callable[[], object]] = [partial(flag, name) for name in flags]
    checks.append(partial(whole_number, "OMP_NUM_THREADS", 1, at_least=1))  # Accelerate would end in a traceback
    for check in checks:
        try:
            check()
        except HarnessError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else ManyErrors("environment", errors)


@contextmanager
def accelerate_settings_hidden() -> Iterator[dict[str, str]]:
    """Hide Accelerate's settings in the block; yields those that asked for something.

    `accelerate launch` sets neutral ones for every process; they are hidden without a word.
    """
    hidden = _take_settings()
    try:
        yield {name: value for name, value in hidden.items() if _asks(name, value)}
    finally:
        _take_settings()  # Accelerate notes its own there
        os.environ.update(hidden)


def _take_settings() -> dict[str, str]:
    names = [
        name
        for name, value in os.environ.items()
        if name.startswith((*_HIDDEN, *_OTHER_LAUNCHERS)) and not (name in _LAUNCHERS and value)
    ]
    return {name: os.environ.pop(name) for name in names}


def _asks(name: str, value: str) -> bool:
    text = value.lower()
    if name.startswith(_OTHER_LAUNCHERS):
        return False
    one = name.endswith(("GRADIENT_ACCUMULATION_STEPS", "_SIZE", "_DEGREE")) and text == "1"
    details = name.startswith(("FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "ACCELERATE_DYNAMO_"))
    return not (text in _NEUTRAL or one or (details and name != "ACCELERATE_DYNAMO_BACKEND"))


def noted(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that may change speed or rounding, for provenance.json."""
    return {name: value for name, value in sorted(environment.items()) if name.startswith(_NOTED)}


def calm_openmp() -> None:
    """Let OpenMP's threads wait quietly; to be called before torch is imported.

    libgomp's threads spin while they wait for one another. Next to another busy process, as on a shared machine, that
    makes small networks several times slower than with a short spin. A user's own setting stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100")
