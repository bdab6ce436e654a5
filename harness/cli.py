"""The command line: parse, call one function, print. No logic, and nothing heavy is imported for `--help`."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import harness
from harness import commands, commands_look, commands_speed, commands_sweep, commands_track
from harness.environment import calm_openmp, refuse_arithmetic
from harness.errors import EXIT_BAD_INPUT, EXIT_DONE, HarnessError, from_disk, nearest, print_error
from harness.launch.rank_env import set_from_srun

# Groups of `harness --help`, each command with its line.
GROUPS = {
    "Train": {
        "train": "train a recipe",
        "eval": "evaluate a run's checkpoint on its test split",
        "predict": "classify image files with a run's checkpoint",
        "lr-find": "the learning-rate range test: loss over a growing rate, and what it suggests",
        "sweep": "train a recipe at several settings and with several seeds, and compare",
    },
    "Cluster": {
        "submit": "hand a training to SLURM; it resumes by itself when it is preempted",
    },
    "Look": {
        "summary": "a recipe's network: layers, receptive fields, constraints",
        "recipe": "show, validate or describe recipes",
        "data": "convert and verify data",
        "report": "a run as one HTML page: curves, mistakes, Grad-CAM, calibration",
        "runs": "list runs: how far, how good, what is broken",
        "curves": "draw the curves of runs in the terminal",
        "compare": "compare runs: differences, mean and spread over seeds, significance",
        "track": "upload runs to Weights & Biases afterwards",
        "dashboard": "write a W&B workspace for a recipe or a project",
    },
    "Measure": {
        "bench": "which loader, which precision, how fast here; in a checkout beside peers too",
        "scale": "predict step time and efficiency on many GPUs",
        "doctor": "what this machine has; --numerics checks its kernels",
    },
}
ROOMS = (commands, commands_look, commands_speed, commands_sweep, commands_track)
BUILDERS = {name: value for room in ROOMS for name, value in vars(room).items()}
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    name: (text, BUILDERS[f"build_{name.replace('-', '_')}"])
    for group in GROUPS.values()
    for name, text in group.items()
}
LASTING = ("train", "sweep", "submit", "data", "track", "bench")  # do more than print: nobody need read on
COMPUTING = ("train", "eval", "predict", "lr-find", "bench", "summary", "doctor")
EXIT_CODE_FILE = "HARNESS_EXIT_CODE_FILE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 broke off, 2 bad input, 3 diverged, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # whose encoding may lack ± or the dots of a curve
        sys.stdout.reconfigure(errors="replace")
    began_at = time.perf_counter()
    if argv is None:
        began_at -= time.process_time()  # what Python worked before; the process may be as old as a shell that waited
        calm_openmp()
    set_from_srun()
    words = sys.argv[1:] if argv is None else list(argv)
    with _carrying_on(words if argv is None else ()):
        code = _exit_code(words, began_at)
    _tell_launcher(code)
    return code


def _exit_code(argv: list[str], began_at: float) -> int:
    """Run a command; every error of a user's, or of a machine's, becomes a message and a code."""
    try:
        code = _run(argv, began_at)
    except HarnessError as error:
        print_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except MemoryError as error:
        print_error(HarnessError(f"not enough memory: {error}", hint="Fewer or smaller images, or a smaller batch."))
        code = EXIT_BAD_INPUT
    except ImportError as error:
        if (error.name or "").split(".")[0] == "harness":
            raise
        hint = "./scripts/setup.sh installs what is missing into .venv: start by ./launch.sh or .venv/bin/python."
        print_error(HarnessError(str(error), where=sys.executable, hint=hint))
        code = EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of our output left, as `| head` does, and nothing else was to be done
        if argv[:1] and argv[0] in LASTING:  # whose output cannot break: this is another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    except OSError as error:
        told = from_disk(error)
        if told is None:
            raise
        print_error(told)
        code = told.exit_code
    return code


def _run(argv: list[str], began_at: float) -> int:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise HarnessError(f'unknown command "{argv[0]}"', hint=nearest(argv[0], COMMANDS))
    if argv and argv[0] in COMPUTING and not {"-h", "--help"} & set(argv):
        refuse_arithmetic()  # before timm is imported, which ends in a traceback where a variable is no number
    arguments, unknown = _parser().parse_known_args(argv)
    take_overrides(arguments, unknown)
    arguments.began_at = began_at
    return int(arguments.run(arguments))


def _tell_launcher(code: int) -> None:
    """Launchers of several ranks return 1 whatever a rank returned; launch.sh reads the code from this file."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path:
        with suppress(FileNotFoundError), open(path, "a") as file:  # one that no longer waits has cleared it away
            file.write(f"{code}\n")


@contextmanager
def _carrying_on(argv: Sequence[str]) -> Iterator[None]:
    """Let a command that does more than print carry on when the reader of its output leaves, as `| head` does."""
    if argv[:1] and argv[0] in LASTING and isinstance(sys.stdout, io.TextIOWrapper):
        before, streams = (sys.stdout, sys.stderr), [_Lasting(s) for s in (sys.stdout, sys.stderr)]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
                stream.detach()  # else the buffer is closed with it
            sys.stdout, sys.stderr = before
    else:
        yield


class _Lasting(io.TextIOWrapper):
    """stdout or stderr, without its reader if need be."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._carry_on(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._carry_on(error)

    def _carry_on(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without its reader, a terminal that was closed
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


class Parser(argparse.ArgumentParser):
    """Bad options are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise HarnessError(f"{self.prog}: {message}", hint=f"See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    lines = [
        f"{group}:\n" + "\n".join(f"  {name:<10}{text}" for name, text in members.items())
        for group, members in GROUPS.items()
    ]
    parser = Parser(
        prog="harness",
        description="Trains image classifiers from YAML recipes on a CPU, one GPU, many GPUs or a SLURM cluster.\n\n"
        + "\n\n".join(lines),
        epilog="harness COMMAND --help tells more about one. Exit codes: 0 done, 1 broken off,\n"
        "2 bad recipe, option or data, 3 diverged, 75 stopped by a signal with a checkpoint written.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="harness [--version] COMMAND …",
    )
    parser.add_argument("--version", action="version", version=f"harness {harness.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", required=True, help=argparse.SUPPRESS, metavar="COMMAND", prog="harness"
    )
    for name, (text, build) in COMMANDS.items():
        build(subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return parser


def take_overrides(arguments: argparse.Namespace, unknown: list[str]) -> None:
    """Overrides may stand before or behind options; anything else that is left over is a mistake."""
    options = [a for a in unknown if a.startswith("-")]
    if hasattr(arguments, "sbatch_options"):  # `submit` hands them on
        arguments.sbatch_options, unknown = options, [a for a in unknown if a not in options]
        values = [a for a in unknown if "=" not in a]
        if options and values:
            hint = f"Options of sbatch are written as one word, such as {options[0]}={values[0]}."
            raise HarnessError(f'unknown argument "{values[0]}"', hint=hint)
        options = []
    takes = hasattr(arguments, "overrides")
    if options or (unknown and not takes):
        wrong = (options or unknown)[0]
        raise HarnessError(
            f'unknown argument "{wrong}"',
            hint=f"See harness {arguments.command} --help; overrides are key.path=value.",
        )
    if takes:
        arguments.overrides = [*arguments.overrides, *unknown]
