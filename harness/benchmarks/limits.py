"""What this processor can do at most: matrix products and copies, measured beside the contestants."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

GEMM_SIZE = 2048
COPY_BYTES = 1 << 28  # far more than the caches hold
MEASURE_SECONDS = 0.4


def gemm(*, bf16: bool) -> Callable[[], tuple[float, int]]:
    """A round of products of square matrices; counts floating-point operations, 2·n³ a product."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    return _round(lambda: a @ b, 2 * GEMM_SIZE**3)


def copy() -> Callable[[], tuple[float, int]]:
    """A round of copies in memory; counts bytes read and bytes written."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return _round(lambda: target.copy_(source), 2 * COPY_BYTES)


def _round(work: Callable[[], object], count: int) -> Callable[[], tuple[float, int]]:
    work()

    def one_round() -> tuple[float, int]:
        start, times = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < MEASURE_SECONDS:
            work()
            times += 1
        return seconds, times * count

    return one_round
