"""All rows of the table, in its order."""

from __future__ import annotations

from tests.faults import rows_files, rows_kill, rows_ranks, rows_services
from tests.faults.fault import REGISTRY

__all__ = ["REGISTRY"]

_ORDER = [module.__name__ for module in (rows_kill, rows_files, rows_ranks, rows_services)]
for _row in sorted(REGISTRY.values(), key=lambda row: _ORDER.index(row.run.__module__)):
    REGISTRY[_row.name] = REGISTRY.pop(_row.name)
