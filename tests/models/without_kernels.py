"""A stretch of a test as on a machine that has not opened the compiled kernels yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from harness.models import kernels


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """What is opened inside is closed again afterwards, and what was open before is open again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_libraries", {})
        yield
