"""Errors a user can act on: where, what, the nearest valid name, and a `HINT:` with the fix.

The command line prints these without a traceback and exits with their `exit_code`.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import unicodedata
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1  # broken off by something outside that may pass, such as a full disk
EXIT_BAD_INPUT = 2  # recipe, option or data: nothing was started
EXIT_DIVERGED = 3  # the loss or a gradient is not finite
EXIT_REQUEUE = 75  # stopped by a signal, checkpoint written (sysexits.h EX_TEMPFAIL)

MOST_NAMES = 12  # that a hint lists

# What a disk answers that is full or failing: another time it may not.
_TRANSIENT_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)
# And one that is read-only or another's; anything else is a mistake of ours.
_DISK_ERRORS = (*_TRANSIENT_DISK_ERRORS, errno.EROFS, errno.EACCES, errno.EPERM)


class HarnessError(Exception):
    """A mistake or condition that the user can fix: what is wrong in one sentence, where (file:line, key or path), and
    what to do."""

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, exit_code: int = EXIT_BAD_INPUT
    ) -> None:
        self.what, self.where, self.hint, self.exit_code = what, where, hint, exit_code
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed: `where: what`, then the hint on its own line."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  HINT: {self.hint}" if self.hint else text


class ManyErrors(HarnessError):
    """Several errors found in one pass, printed together so that one edit can fix them all."""

    def __init__(self, title: str, errors: list[HarnessError]) -> None:
        self.errors = errors
        lines = "\n".join(f"  {line}" for error in errors for line in error.render().split("\n"))
        count = f"{len(errors)} error" + ("s" if len(errors) != 1 else "")
        super().__init__(f"{title}: {count}\n{lines}", exit_code=max(error.exit_code for error in errors))


class Diverged(HarnessError):
    """Training met a loss or gradient that is not finite."""

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, where=where, hint=hint, exit_code=EXIT_DIVERGED)


def exit_code_of(error: OSError) -> int:
    """Whether it may pass (EXIT_FAILED), as a full disk does, or the user must change something (EXIT_BAD_INPUT)."""
    return EXIT_FAILED if error.errno in _TRANSIENT_DISK_ERRORS else EXIT_BAD_INPUT


def from_disk(error: OSError) -> HarnessError | None:
    """The error of a disk that took no more, in the user's words; None for any other error."""
    if error.errno not in _DISK_ERRORS:
        return None
    where = str(error.filename2 or error.filename or "") or None
    hint = "See that the disk has space and may be written to; --resume auto then resumes a training."
    return HarnessError(f"cannot be written or read ({error.strerror})", where=where, hint=hint, exit_code=EXIT_FAILED)


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that a wrong one is most like, or has the letters of; None where none is like it."""
    names = sorted({str(v) for v in valid})
    same_letters = [v for v in names if sorted(v) == sorted(str(name))]
    return next(iter(difflib.get_close_matches(str(name), names, n=1, cutoff=0.6) or same_letters), None)


def nearest(name: str, valid: Iterable[str], *, within: str = "") -> str:
    """A phrase that helps with a wrong name: the closest valid one, else the valid names when they are few.

    Args:
        within: what stands before the names, such as "training.".
    """
    names = sorted({str(v) for v in valid})
    close = closest(name, names)
    if close is not None:
        # What the eye may not see: accents as characters of their own, look-alike letters, spaces without a width.
        strange = [c for c in dict.fromkeys(str(name)) if not c.isascii() and c not in close]
        listed = " and ".join(f"U+{ord(c):04X} {unicodedata.name(c, '')}".rstrip() for c in strange)
        return f'Did you mean "{within}{close}"?' + (f" The given name has {listed}." if strange else "")
    if not names:
        return "There are no valid names here."
    if len(names) <= MOST_NAMES:
        return f"Valid names: {', '.join(names)}."
    return f"Valid names begin with: {', '.join(names[:MOST_NAMES])}, …"


def print_error(error: HarnessError) -> None:
    """Print an error to stderr as the user sees it; ranks that fail alike say it once, the others in one line."""
    rank = os.environ.get("RANK", "0")
    word = "STOPPED" if error.exit_code == EXIT_REQUEUE else "ERROR"
    text = f"{word} {error}" if rank == "0" else f"{word} (rank {rank}) {str(error).splitlines()[0]}"
    print(text, file=sys.stderr, flush=True)
