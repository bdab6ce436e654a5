"""All rows of the table, in its order."""

from __future__ import annotations

from tests.faults import (
    rows_damage,
    rows_disk,
    rows_forged,
    rows_kill,
    rows_malice,
    rows_numbers,
    rows_ranks,
    rows_signals,
    rows_wandb,
)
from tests.faults.fault import REGISTRY

_ORDER = (
    rows_kill,
    rows_signals,
    rows_disk,
    rows_damage,
    rows_forged,
    rows_malice,
    rows_ranks,
    rows_wandb,
    rows_numbers,
)

__all__ = ["REGISTRY"]

_places = {module.__name__: number for number, module in enumerate(_ORDER)}
for _row in sorted(REGISTRY.values(), key=lambda row: _places[row.run.__module__]):
    REGISTRY[_row.name] = REGISTRY.pop(_row.name)
