"""Sweeps on a W&B server."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError


def create_sweep(configuration: Mapping[str, Any], *, project: str, entity: str | None) -> str:
    """Create a sweep on the server; its id.

    Args:
        configuration: as W&B documents it.
        project, entity: that the sweep belongs to; None takes the user's own.

    Raises:
        HarnessError: no key, no server, or the server does not take the sweep.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import wandb

        try:
            with contextlib.redirect_stdout(sys.stderr):  # which it prints on, beside the id
                return str(wandb.sweep(dict(configuration), project=project, entity=entity))
        except Exception as error:  # whatever the client or the server has against it
            raise HarnessError(
                f"W&B does not take the sweep ({type(error).__name__}: {error})",
                hint="See WANDB_API_KEY and WANDB_BASE_URL, and that the server has sweeps; "
                "--wandb --dry-run shows the configuration, --local and --slurm need no server.",
                exit_code=EXIT_FAILED,
            ) from None
        finally:
            wandb.teardown()
