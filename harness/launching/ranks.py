"""`accelerate launch`, with the exit code of the training and without a launcher's traceback.

`python -m harness.launching.ranks accelerate launch [options] -m harness train RECIPE` runs that command in this
process, and again from the last checkpoint up to `--max-restarts N` times when a rank dies or fails. Accelerate and
torchrun answer 1 (or a traceback) whatever the ranks returned; here the code comes from the ranks, which write theirs
to `$HARNESS_EXIT_CODE_FILE`, a line each. Signals are handed on. `python -m harness train RECIPE` in place of
`accelerate launch …` runs a single process in the same care.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from harness.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE
from harness.launching.attempts import next_attempt, value_of, with_run_directory

CODE_FILE_VARIABLE = "HARNESS_EXIT_CODE_FILE"
HANDED_ON_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
SHUTDOWN_SECONDS = "120"  # for the checkpoint a rank writes when told to stop; torch's default is 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the code that the ranks wrote, 0 for success, 1 where a rank died."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    max_restarts = 0
    if words[:1] == ["--max-restarts"] and len(words) > 1 and words[1].isdecimal():
        max_restarts, words = int(words[1]), words[2:]
    if words[:2] != ["accelerate", "launch"] and words[:1] != ["python"]:
        print(
            f"usage: {__spec__.name} [--max-restarts N] (accelerate launch [options] | python) -m MODULE …",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    if max_restarts:
        words = with_run_directory(words)
    for attempt in range(max_restarts + 1):
        ended = _attempt(words)
        again = next_attempt(words)
        if ended.code != EXIT_FAILED or ended.told_to_stop or attempt == max_restarts or again is None:
            break
        print(f"launch: starting the ranks again ({attempt + 1} of {max_restarts} restarts)", file=sys.stderr)
        words = again
    return ended.code


@dataclass(frozen=True)
class _Ended:
    """How one attempt ended."""

    code: int
    told_to_stop: bool = False


def _attempt(words: list[str]) -> _Ended:
    with tempfile.TemporaryDirectory(prefix="harness-ranks-") as folder:
        code_file = Path(folder, "exit_code")
        os.environ[CODE_FILE_VARIABLE] = str(code_file)
        if words[0] == "python":
            return _single([sys.executable, *words[1:]], code_file)
        return _launch(_on_loopback(words[2:]), code_file)


def _single(command: list[str], code_file: Path) -> _Ended:
    """One process without a launcher; signals are handed on to it."""
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    process = subprocess.Popen(command)
    numbers = [signal.Signals[name] for name in HANDED_ON_SIGNALS.split(",")]
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    told = bool(received)
    if code == EXIT_DONE:
        return _Ended(code, told)
    return _Ended(exit_code(code, read_codes(code_file), told_to_stop=told), told)


def _launch(options: list[str], code_file: Path) -> _Ended:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", HANDED_ON_SIGNALS)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    # The ranks have said what went wrong; the launcher's view of it is shown only where no rank could.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    torchrun.logger.addFilter(_says_something)
    try:
        launch_command(launch_command_parser().parse_args(options))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code = exit_code(first.exitcode, read_codes(code_file))
        if code == EXIT_FAILED:
            print(f"launch: a rank failed\n{error}", file=sys.stderr)
        return _Ended(code)
    except SignalException as error:
        written = read_codes(code_file)
        ranks = value_of(options, "--num_processes")
        if ranks is not None and written == [EXIT_DONE] * int(ranks):
            return _Ended(EXIT_DONE)  # all had ended when the signal came
        return _Ended(exit_code(-int(error.sigval), written, told_to_stop=True), told_to_stop=True)
    return _Ended(EXIT_DONE)


def _says_something(record: logging.LogRecord) -> bool:
    """Accelerate always gives the option `master_addr`, and torch warns of it where the ranks meet in another way."""
    return "master_addr is only used" not in record.getMessage()


def exit_code(first_failure: int, written: Sequence[int], *, told_to_stop: bool = False) -> int:
    """What the whole command returns when not every rank returned 0.

    Args:
        first_failure: exit code of the rank that ended first with one; negative: the signal that ended it.
        written: what ranks wrote, in that order; those that were killed wrote nothing.
        told_to_stop: the command itself was sent the signal.

    A rank that stops with a checkpoint only because another one died has no orderly stop to report: 75 would ask for
    the job to be queued again, and again.
    """
    for code in written:
        if code in (EXIT_BAD_INPUT, EXIT_DIVERGED):
            return code
    if told_to_stop:
        failures = [code for code in written if code != EXIT_DONE]
        # A rank that failed on the way: 1, before 75.
        return min(failures) if failures else 128 + abs(first_failure)
    if first_failure in (EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_REQUEUE):
        return first_failure
    return EXIT_FAILED


def read_codes(code_file: Path) -> list[int]:
    """The numbers that ranks wrote."""
    try:
        return [int(line) for line in code_file.read_text().split()]
    except (OSError, ValueError):
        return []


def _on_loopback(options: list[str]) -> list[str]:
    """The options, with the rendezvous of one machine unless they name another one."""
    own = options[: options.index("-m")] if "-m" in options else options
    if any(word.startswith(("--main_process_port", "--num_machines", "--rdzv")) for word in own):
        return options
    from harness.launching import loopback

    loopback.register()
    return ["--rdzv_backend", loopback.BACKEND, *options]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the libraries are imported, Ctrl-C ends quietly
    sys.exit(main())
