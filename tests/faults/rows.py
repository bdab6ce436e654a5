"""All rows of the table, in its order."""

from __future__ import annotations

from tests.faults import rows_disk, rows_kill, rows_signals
from tests.faults.fault import REGISTRY

__all__ = ["REGISTRY", "rows_disk", "rows_kill", "rows_signals"]
