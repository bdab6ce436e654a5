"""`accelerate launch` with the exit code of the training, restarts, and no launcher's traceback.

`python -m harness.launch.torchrun [--max-restarts N] accelerate launch … -m harness train RECIPE …` runs that command
in this process, and again from the last checkpoint when a rank dies or fails. Accelerate and torchrun return 1 (or end
in a traceback) whatever the ranks returned; here the code comes from the ranks, which write theirs to
`$HARNESS_EXIT_CODE_FILE`, a line each.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE
from harness.runs import has_checkpoints
from harness.signals import STOP_SIGNALS

CODE_FILE_VARIABLE = "HARNESS_EXIT_CODE_FILE"
FORWARDED_SIGNALS = (*STOP_SIGNALS, signal.SIGQUIT)
SHUTDOWN_SECONDS = "120"  # for the checkpoint that a rank writes when it is stopped; torch's default is 30
RENDEZVOUS_SECONDS = 600


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the code that the ranks wrote, 0 for success, 1 where a rank died."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    max_restarts = 0
    if words[0] == "--max-restarts":
        max_restarts, words = int(words[1]), words[2:]
    for attempt in range(max_restarts + 1):
        with tempfile.TemporaryDirectory(prefix="harness-ranks-") as folder:
            code, was_stopped = _launch(words[2:], Path(folder, "exit_code"))
        again = next_attempt(words)
        if code != EXIT_FAILED or was_stopped or attempt == max_restarts or again is None:
            break
        print(f"launch: starting the ranks again ({attempt + 1} of {max_restarts} restarts)", file=sys.stderr)
        words = again
    return code


def next_attempt(words: list[str]) -> list[str] | None:
    """The command for another attempt, or None where it could not resume the same run.

    That is so for a run that started from a checkpoint of another one and has written none of its own yet.
    """
    resume, run = option_value(words, "--resume"), option_value(words, "--run-dir")
    if resume not in (None, "never", "auto") and (run is None or not has_checkpoints(Path(run))):
        return None
    return [*words, "--resume", "auto"]


def option_value(words: Sequence[str], option: str) -> str | None:
    """The value of an option, given as two words or as `--option=value`; the last one counts."""
    value = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _launch(options: list[str], code_file: Path) -> tuple[int, bool]:
    """`accelerate launch`; returns the exit code, and whether a signal stopped the launcher."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    rendezvous_handler_registry.register("loopback", _meet_on_loopback)
    os.environ[CODE_FILE_VARIABLE] = str(code_file)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in FORWARDED_SIGNALS))
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    # The ranks have said what went wrong; the launcher's view of it is shown only where no rank could.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # Accelerate always gives the option `master_addr`, and torch warns of it where the ranks meet in another way.
    torchrun.logger.addFilter(lambda record: "master_addr is only used" not in record.getMessage())
    code, was_stopped = EXIT_DONE, False
    try:
        launch_command(launch_command_parser().parse_args(["--rdzv_backend", "loopback", *options]))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code = exit_code(first.exitcode, _read_codes(code_file))
        if code == EXIT_FAILED:
            print(f"launch: a rank failed\n{error}", file=sys.stderr)
    except SignalException as error:
        written = _read_codes(code_file)
        if any(written) or str(len(written)) != option_value(options, "--num_processes"):  # else all had ended before
            code, was_stopped = exit_code(-int(error.sigval), written, was_stopped=True), True
    return code, was_stopped


def _meet_on_loopback(parameters: Any) -> Any:
    """A torch rendezvous for the ranks of one machine, whose store nothing outside can reach.

    torch's own store listens on every address. This one is given a socket that listens already, so that nobody can take
    the port between its choice and its use.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Loopback(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return "loopback"

    server = socket.create_server(("127.0.0.1", 0))
    address, port = server.getsockname()
    rendezvous = Loopback(address, port, 0, 1, parameters.run_id, RENDEZVOUS_SECONDS)
    rendezvous._store = TCPStore(
        address,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=RENDEZVOUS_SECONDS),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )
    return rendezvous


def exit_code(first_failure: int, written: Sequence[int], *, was_stopped: bool = False) -> int:
    """What the whole command returns when not every rank returned 0.

    `first_failure` is the exit code of the rank that ended first with one (negative: the signal that ended it),
    `written` what ranks wrote, in that order: those that were killed wrote nothing. A rank that stops with a checkpoint
    only because another one died has no orderly stop to report: 75 would ask for the job to be queued again, and again.
    """
    for code in written:
        if code in (EXIT_BAD_INPUT, EXIT_DIVERGED):
            return code
    if was_stopped:
        failures = [code for code in written if code != EXIT_DONE]
        return min(failures, default=128 + abs(first_failure))  # a rank that failed on the way: 1, before 75
    if first_failure in (EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_REQUEUE):
        return first_failure
    return EXIT_FAILED


def _read_codes(code_file: Path) -> list[int]:
    return [int(line) for line in code_file.read_text().split()] if code_file.exists() else []


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the libraries are imported, Ctrl-C ends quietly
    sys.exit(main())
