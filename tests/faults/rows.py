"""All rows of the table, in its order."""

from __future__ import annotations

from tests.faults import rows_damage, rows_disk, rows_kill, rows_numbers, rows_ranks, rows_signals, rows_wandb
from tests.faults.fault import REGISTRY

MODULES = (rows_kill, rows_signals, rows_disk, rows_damage, rows_ranks, rows_wandb, rows_numbers)

__all__ = ["MODULES", "REGISTRY"]
