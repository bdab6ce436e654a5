"""`accelerate launch`, with the exit code of the training and without a launcher's traceback.

`python -m harness.launching.ranks accelerate launch [options] -m harness train RECIPE` runs that command in this
process. Accelerate and torchrun answer 1 (or a traceback) whatever the ranks returned; here the code comes from the
ranks, which write theirs to `$HARNESS_EXIT_CODE_FILE`, a line each, when they fail or stop. Signals are handed on.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_REQUEUE

EXIT_FAILED = 1
CODE_FILE_VARIABLE = "HARNESS_EXIT_CODE_FILE"
HANDED_ON_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
SHUTDOWN_SECONDS = "120"  # for the checkpoint a rank writes when told to stop; torch's default is 30
DEFAULT_EPHEMERAL_START = 32768


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the code that the ranks wrote, 0 for success, 1 where a rank died."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] != ["accelerate", "launch"]:
        print(f"usage: {__spec__.name} accelerate launch [options] -m MODULE …", file=sys.stderr)
        return EXIT_BAD_INPUT
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", HANDED_ON_SIGNALS)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    with tempfile.TemporaryDirectory(prefix="harness-ranks-") as folder:
        code_file = Path(folder, "exit_code")
        os.environ[CODE_FILE_VARIABLE] = str(code_file)
        return _launch(_with_port(words[2:]), code_file)


def _launch(options: list[str], code_file: Path) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The ranks have said what went wrong; the launcher's view of it is shown only where no rank could.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(options))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code = exit_code(first.exitcode, read_codes(code_file))
        if code == EXIT_FAILED:
            print(f"launch: a rank failed\n{error}", file=sys.stderr)
        return code
    except SignalException as error:
        return exit_code(-int(error.sigval), read_codes(code_file), told_to_stop=True)
    return 0


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
        return min(written) if written else 128 - first_failure  # a rank that failed on the way: 1, before 75
    if first_failure in (EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_REQUEUE):
        return first_failure
    return EXIT_FAILED


def read_codes(code_file: Path) -> list[int]:
    """The numbers that ranks wrote."""
    try:
        return [int(line) for line in code_file.read_text().split()]
    except (OSError, ValueError):
        return []


def _with_port(options: list[str]) -> list[str]:
    """The options, with a port for the ranks of this machine to meet at unless they name one."""
    own = options[: options.index("-m")] if "-m" in options else options
    if any(word.startswith(("--main_process_port", "--num_machines")) for word in own):
        return options
    return ["--main_process_port", str(free_port()), *options]


def free_port(seed: str | None = None) -> int:
    """A free TCP port below the range that outgoing connections take theirs from.

    A port of that range can be lost to something else before rank 0 listens, and the ranks would wait in vain.

    Args:
        seed: where the search begins; jobs with seeds of their own begin apart, and so do not race for one port. None
            begins anywhere and asks for a port of the loopback interface alone.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        end = DEFAULT_EPHEMERAL_START
    ports = list(range(max(1024, end // 2), end)) or [0]
    for port in random.Random(seed).sample(ports, min(len(ports), 200)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1" if seed is None else "", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the libraries are imported, Ctrl-C ends quietly
    sys.exit(main())
