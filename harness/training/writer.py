"""Checkpoints are written beside the training: it waits for the copy to the host, not for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from harness.training import checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time into `directory` and drops those that are no longer kept.

    Args:
        directory: `checkpoints/` of a run.
        keep_last: newest checkpoints kept.

    Attributes:
        check_hold: raises where the run directory is another process's by now.
    """

    check_hold: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, directory: Path, *, keep_last: int) -> None:
        self._directory, self._keep_last = directory, keep_last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="harness-checkpoint")
        self._writing: Future[None] | None = None

    def submit(self, saved: checkpoint.Snapshot, *, keep: Path | None) -> None:
        """Begin to write; the one before is on the disk when this returns.

        Args:
            keep: a checkpoint that is never dropped (the best one).

        Raises:
            HarnessError: the one before could not be written, or the directory is another process's.
        """
        self.wait()
        self.check_hold()
        self._writing = self._thread.submit(self._write, saved, keep)

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            HarnessError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread; a checkpoint under way is finished first."""
        self._thread.shutdown()

    def _write(self, saved: checkpoint.Snapshot, keep: Path | None) -> None:
        checkpoint.write(self._directory, saved, before_rename=self.check_hold)
        checkpoint.prune(self._directory, keep_last=self._keep_last, keep=keep)
