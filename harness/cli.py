"""The command line: a table of the commands and their options, and what becomes of errors. `commands` has the bodies.

Only the options of the command at hand are declared, and nothing heavy is imported before it runs.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import harness
from harness import commands
from harness.environment import calm_openmp, refuse_arithmetic
from harness.errors import EXIT_DONE, HarnessError, from_disk, nearest, print_error
from harness.files import expand
from harness.launch.rank_env import set_from_srun
from harness.runs import RUNS

EXIT_CODE_FILE = "HARNESS_EXIT_CODE_FILE"
MAX_STEP_MS = 86_400_000.0  # a day
ROOT = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """Bad options are errors like all others."""

    hint: str | None = None

    def error(self, message: str) -> NoReturn:
        raise HarnessError(f"{self.prog}: {message}", hint=self.hint or f"See {self.prog} --help.")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # what --help printed: an error is reported here, and not at Python's own end
        super().exit(status, message)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Overrides may stand before or after options; anything else that is left over is a mistake."""
        arguments, left = self.parse_known_args(words)
        options = [word for word in left if word.startswith("-")]
        if hasattr(arguments, "sbatch_options"):  # `submit` hands them on
            arguments.sbatch_options, left = options, [word for word in left if word not in options]
            values = [word for word in left if "=" not in word]
            if options and values:
                hint = f"Options of sbatch are written as one word, such as {options[0]}={values[0]}."
                raise HarnessError(f'unknown argument "{values[0]}"', hint=hint)
            options = []
        if options or (left and not hasattr(arguments, "overrides")):
            what = f'unknown argument "{(options or left)[0]}"'
            raise HarnessError(what, hint=f"See {self.prog} --help; overrides are key.path=value.")
        if left:
            arguments.overrides = [*arguments.overrides, *left]
        return arguments


# --- values of options


def whole_number(least: int = 1, most: int = 1_000_000) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f'must be a whole number from {least} to {most}, not "{text}"')
        return int(text)

    return parse


def whole_numbers(text: str) -> list[int]:
    return [whole_number()(part.strip()) for part in text.split(",")]


def _milliseconds(text: str) -> float:
    value = 0.0
    with suppress(ValueError):
        value = float(text)
    if not 0 < value <= MAX_STEP_MS:  # NaN is refused, too
        raise argparse.ArgumentTypeError(f'must be more than 0 and at most {MAX_STEP_MS:,.0f} ms, not "{text}"')
    return value


def _image_file(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"reads files and downloads nothing; fetch it first: curl -LO {text}")
    return Path(text)


# --- the commands

Option = tuple[str, dict[str, Any]]


class Command(NamedTuple):
    """A command, or one of its actions."""

    group: str  # where `harness --help` lists it
    help: str
    run: Callable[[argparse.Namespace], int | None] | None = None  # returns the exit code, None where it is 0
    # A list in it holds options that exclude one another; a function declares its own.
    options: Sequence[Option | list[Option] | Callable[[Parser], None]] = ()
    actions: Mapping[str, Command] = {}
    description: str | None = None
    lasting: bool = False  # does more than print: carries on when the reader of its output leaves
    computing: bool = False  # imports torch and timm, which read variables that change arithmetic


def option(name: str, metavar: str | None, text: str, **how: Any) -> Option:
    return name, {"metavar": metavar, "help": text, **how}


def flag(name: str, text: str) -> Option:
    return name, {"action": "store_true", "help": text}


def _slurm_options(parser: Parser) -> None:
    from harness.launch.slurm import add_options

    many = parser.prog == "harness sweep"  # whose jobs are arrays of runs that are known already
    add_options(parser.add_argument_group("with --slurm") if many else parser, array_of_seeds=not many)
    if not many:
        parser.epilog = "Other options of sbatch are handed on to it; they are written --name=value."
        parser.allow_abbrev = False  # --gpus is an option of sbatch too
        parser.set_defaults(sbatch_options=[])


ROUNDS = option("--rounds", "N", "contestants in turn (default 5)", type=whole_number(), default=5)
JSON = flag("--json", "print one JSON object")
OVERRIDES = option("overrides", "key.path=value", "change a setting, e.g. training.epochs=2", nargs="*", default=[])
RECIPE = option("recipe", "RECIPE", "a YAML file, or the name of a packaged recipe")
RUN_DIR = option(
    "--run-dir",
    "DIR",
    "where to write (default runs/<recipe>/<run-id>)",
    type=lambda text: Path(expand(text, where="--run-dir")),
)
RUN = option("run_path", "RUN", "a run directory, or one of its checkpoints", type=Path)
CHECKPOINT = option("--checkpoint", "WHICH", "last (default), best or step_N", default="last")
MANY_RUNS = option("run_paths", "RUN", "a run directory", type=Path, nargs="+")
WEIGHTS = option("--weights", None, "which weights (default raw)", choices=("raw", "ema"), default="raw")

# fmt: off
COMMANDS = {
    "train": Command("Train", "train a recipe", commands.train, [
        RECIPE, OVERRIDES, RUN_DIR,
        option("--resume", "auto|never|PATH", "auto: from the last good checkpoint, if there is one; never (default): "
               "from the start; or from this checkpoint or run", default="never"),
        flag("--profile", "time and trace some steps; see DIR/profile"),
    ], lasting=True, computing=True),
    "eval": Command("Train", "evaluate a run's checkpoint on its test split", commands.evaluate, [
        RUN, CHECKPOINT,
        option("--recalibrate", "N", "take BatchNorm statistics from N training batches, with dropout off "
               "(default: as saved)", type=whole_number(0), default=0),
        JSON,
    ], computing=True),
    "predict": Command("Train", "classify image files with a run's checkpoint", commands.predict, [
        RUN, option("images", "IMAGE", "image files", type=_image_file, nargs="+"), CHECKPOINT, WEIGHTS,
        option("--top", "K", "classes to name (default 3)", type=whole_number(), default=3), JSON,
    ], computing=True),
    "lr-find": Command("Train", "the learning-rate range test: loss over a growing rate, and what it suggests",
                       commands.lr_find, [
        RECIPE, OVERRIDES,
        option("--min-lr", "X", "rate of the first step (default 1e-6)", type=float, default=1e-6),
        option("--max-lr", "X", "rate of the last step (default 10)", type=float, default=10.0),
        option("--steps", "N", "optimizer steps (default 100)", type=whole_number(), default=100),
        option("--html", "FILE", "write a page with the curve", type=Path), JSON,
    ], computing=True),
    "sweep": Command("Train", "train a recipe at several settings and with several seeds, and compare",
                     commands.sweep, [
        option("sweep", "SWEEP", "a YAML file: recipe, parameters, seeds, metric", type=Path),
        [
            flag("--local", "train here, one run after another (default)"),
            flag("--slurm", "submit a SLURM array, one task per run"),
            flag("--wandb", "create the sweep on the W&B server and print its id"),
            option("--wandb-agent", "ID", "train here what the W&B server's sweep draws"),
            flag("--table", "print the table of what is finished so far, and stop"),
        ],
        option("--ranks", "N", "processes of each training (default: as launch.sh)", type=whole_number()),
        flag("--retry-failed", "train failed runs again"),
        flag("--dry-run", "check everything and print what would be done"), JSON, _slurm_options,
    ], lasting=True),
    "submit": Command("Cluster", "hand a training to SLURM; it resumes by itself when it is preempted",
                      commands.submit, [
        RECIPE, OVERRIDES, _slurm_options, RUN_DIR,
        flag("--dry-run", "print the batch script; nothing is written or submitted"),
    ], lasting=True),
    "summary": Command("Look", "a recipe's network: layers, receptive fields, constraints", commands.summary,
                       [RECIPE, OVERRIDES, JSON], computing=True),
    "recipe": Command("Look", "show, validate or describe recipes", actions={
        "show": Command("", "the whole recipe, inheritance and defaults resolved", commands.recipe_show,
                        [RECIPE, OVERRIDES]),
        "validate": Command("", "every error of some recipes", commands.recipe_validate,
                            [option("recipes", "RECIPE", "files, and key.path=value for all of them", nargs="+")]),
        "list": Command("", "the recipes that come with the package, for use by name from anywhere",
                        commands.recipe_list),
        "schema": Command("", "JSON Schema of recipes, for editors", commands.recipe_schema),
    }),
    "data": Command("Look", "convert and verify data", actions={
        "prepare": Command("", "convert a recipe's data (training does it by itself)", commands.data_prepare,
                           [RECIPE, OVERRIDES, flag("--force", "convert again even if it is there")]),
        "verify": Command("", "check all converted data against its manifests", commands.data_verify),
    }, lasting=True),
    "report": Command("Look", "a run as one HTML page: curves, mistakes, Grad-CAM, calibration", commands.report, [
        RUN, CHECKPOINT, WEIGHTS,
        option("--output", "FILE", "where to write (default RUN/report.html)", type=Path),
        flag("--serve", "show it at 127.0.0.1 and keep it up to date until Ctrl-C"),
        option("--port", "P", "of --serve (default: a free one)", type=whole_number(most=65535)),
    ], description="Make one HTML file of a run in any state, which opens without a network: figures, curves, "
       "confusion matrix, calibration, worst mistakes, Grad-CAM, receptive fields, network, recipe, provenance."),
    "runs": Command("Look", "list runs: how far, how good, what is broken", commands.runs, [
        option("directory", "DIR", f"(default {RUNS})", type=Path, nargs="?", default=RUNS),
        option("--recipe", "NAME", "only runs of this recipe"), JSON,
    ], description="List runs with their state (running, finished, stopped, empty, broken), the newest last: how far "
       "they are, their best test accuracy, and the age of their latest record."),
    "curves": Command("Look", "draw the curves of runs in the terminal", commands.curves, [
        MANY_RUNS,
        option("--what", "NAME,…", "of loss, accuracy, lr and throughput (default loss,accuracy)",
               default="loss,accuracy"),
        flag("--watch", f"draw again every {commands.WATCH_SECONDS:g} seconds until the runs end or Ctrl-C"),
    ], description="Draw the curves of runs in the terminal: training, test and averaged weights (EMA) together, "
       "several runs over one another. Without a terminal it is plain text, and letters tell the curves apart."),
    "compare": Command("Look", "compare runs: differences, mean and spread over seeds, significance",
                       commands.compare, [
        MANY_RUNS,
        option("--html", "FILE", "write a page with the same tables and the curves", type=Path),
        option("--checkpoint", None, "whose answers are compared (default last)", choices=("last", "best"),
               default="last"),
        WEIGHTS, JSON,
    ], description="Compare runs, grouped by their recipes apart from the seed, with the group of the first run: what "
       "recipes differ in, mean ± standard deviation over seeds, and whether accuracies differ by more than chance."),
    "track": Command("Look", "upload runs to Weights & Biases afterwards", actions={
        "sync": Command("", "bring W&B up to metrics.jsonl: what is there already is not sent again",
                        commands.track_sync,
                        [MANY_RUNS, flag("--rebuild", "upload it whole as a new W&B run, whatever the old one holds")]),
    }, lasting=True),
    "dashboard": Command("Look", "write a W&B workspace for a recipe or a project", commands.dashboard, [
        option("what", "RECIPE|PROJECT", "a YAML file, or a W&B project: [entity/]project"), OVERRIDES,
        flag("--print", "show the specification; needs no key and no extra"),
    ]),
    "bench": Command("Measure", "which loader, which precision, how fast here; in a checkout next to peers too",
                     actions={
        "loader": Command("", "images a second of our loaders, torchvision's and stock FFCV's", commands.bench, [
            option("--workers", "N", "threads or processes (all cores)", type=whole_number()), ROUNDS, JSON,
        ]),
        "step": Command("", "a training step of the seed's network in each precision, PyTorch's and ours",
                        commands.bench, [
            option("--batch-size", "N", "images a step (default 128)", type=whole_number(2), default=128), ROUNDS, JSON,
        ]),
    }, lasting=True, computing=True),
    "scale": Command("Measure", "predict step time and efficiency on many GPUs", commands.scale, [
        RECIPE, OVERRIDES,
        option("--gpus", "N,N,…", "how many (default 1,8,64,1024)", type=whole_numbers, default=[1, 8, 64, 1024]),
        option("--network", "NAME|alpha_us=…,gbps=…", "what connects them: infiniband-ndr (default), infiniband-hdr, "
               "ethernet-100g, ethernet-25g, nvlink4, loopback-gloo, or latency and bandwidth, with intra=NAME within "
               "nodes if wanted", default="infiniband-ndr"),
        option("--gpus-per-node", "G", "GPUs a node (default: the network's)", type=whole_number()),
        option("--step-ms", "X", "a step on one GPU (default: measured here)", type=_milliseconds), JSON,
    ]),
    "doctor": Command("Measure", "what this machine has; --numerics checks its kernels", commands.doctor, [
        (RECIPE[0], {**RECIPE[1], "nargs": "?"}), OVERRIDES,
        flag("--numerics", "run each layer of the recipe's network against a float64 reference, remembering nothing"),
        JSON,
    ], computing=True),
}
# fmt: on


def declare(parser: Parser, command: Command) -> Parser:
    """Give a parser what a command has."""
    parser.description = command.description or f"{command.help[0].upper()}{command.help[1:]}."
    parser.set_defaults(run=command.run)
    for each in command.options:
        if callable(each):
            each(parser)
        else:
            group = parser.add_mutually_exclusive_group() if isinstance(each, list) else parser
            for name, how in each if isinstance(each, list) else [each]:
                group.add_argument(name, **how)
    if command.actions:
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
        for name, action in command.actions.items():
            declare(actions.add_parser(name, help=action.help), action)
    return parser


def parser_of(name: str) -> Parser:
    """The parser of a command."""
    parser, command = Parser(prog=f"harness {name}"), COMMANDS[name]
    if name == "bench" and (ROOT / "scripts" / "benchmarks").is_dir():
        sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
        from scripts.benchmarks.commands import PEERS

        command = command._replace(actions={**command.actions, **PEERS})
    elif name == "bench":
        parser.hint = "What compares the project with its peers needs a checkout; `loader` and `step` work everywhere."
    return declare(parser, command)


def _refuse_or_help(words: Sequence[str]) -> NoReturn:
    """--help, --version, or a mistake."""
    groups = dict[str, str]()
    for name, command in COMMANDS.items():
        groups[command.group] = groups.get(command.group, f"{command.group}:") + f"\n  {name:<10}{command.help}"
    what = "Trains image classifiers from YAML recipes on a CPU, one GPU, many GPUs or a SLURM cluster."
    parser = Parser(
        prog="harness",
        description="\n\n".join([what, *groups.values()]),
        epilog="harness COMMAND --help tells more about one. Exit codes: 0 done, 1 broken off,\n"
        "2 bad recipe, option or data, 3 diverged, 75 stopped by a signal with a checkpoint written.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="harness [--version] COMMAND …",
    )
    parser.add_argument("--version", action="version", version=f"harness {harness.__version__}")
    parser.parse_known_args(words)
    parser.error("the first word must be a command")


# --- running a command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 broke off, 2 bad input, 3 diverged, 130 interrupted."""
    began_at = time.perf_counter()
    # A stream may be closed, as by `>&-`.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # whose encoding may lack ± or the dots of a curve
        sys.stdout.reconfigure(errors="replace")
    words = sys.argv[1:] if argv is None else list(argv)
    lasting = bool(words) and words[0] in COMMANDS and COMMANDS[words[0]].lasting
    if argv is None:
        began_at -= time.process_time()  # what Python worked before; the process may be as old as a shell that waited
        calm_openmp()
        if lasting:
            sys.stdout, sys.stderr = _outliving_reader(sys.stdout), _outliving_reader(sys.stderr)
    set_from_srun()
    code = _exit_code(words, began_at, lasting=lasting)
    for stream in (sys.stdout, sys.stderr):
        _is_lost(stream)
    _tell_launcher(code)
    return code


def _exit_code(words: Sequence[str], began_at: float, *, lasting: bool) -> int:
    """Run a command; every error of a user's, or of a machine's, becomes a message and a code."""
    try:
        if not words or words[0].startswith("-"):
            _refuse_or_help(words)
        if words[0] not in COMMANDS:
            raise HarnessError(f'unknown command "{words[0]}"', hint=nearest(words[0], COMMANDS))
        arguments = parser_of(words[0]).parse(words[1:])
        if COMMANDS[words[0]].computing:
            refuse_arithmetic()  # before timm is imported, which ends in a traceback where a variable is no number
        arguments.began_at = began_at
        code = arguments.run(arguments) or EXIT_DONE
        sys.stdout.flush()
        return int(code)
    except HarnessError as error:
        found = error
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        found = HarnessError(f"not enough memory: {error}", hint="Fewer or smaller images, or a smaller batch.")
    except ImportError as error:
        if (error.name or "").split(".")[0] == "harness":
            raise
        hint = "./scripts/setup.sh installs what is missing into .venv: start by ./launch.sh or .venv/bin/python."
        found = HarnessError(str(error), where=sys.executable, hint=hint)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not lasting:
            return EXIT_DONE  # its reader left, as `| head` does, and nothing else was to be done
        if _is_lost(sys.stdout) and error.filename is None:
            error.filename = "standard output"
        of_a_disk = from_disk(error)
        if of_a_disk is None:
            raise
        found = of_a_disk
    with suppress(OSError):  # nobody can read it
        print_error(found)
    return found.exit_code


def _is_lost(stream: TextIO) -> bool:
    """Whether it cannot be written. Then it goes nowhere, or Python would end with its own exit code of 120."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _outliving_reader(stream: Any) -> TextIO:
    raw = io.BufferedWriter(_OutlivesReader(stream))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)


class _OutlivesReader(io.FileIO):
    """A pipe whose reader may leave, as `| head` does, or a terminal that may be closed: what follows goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream = stream  # which would close the descriptor as it is cleared away

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def _tell_launcher(code: int) -> None:
    """Launchers of several ranks return 1 whatever a rank returned; launch.sh reads the code from this file."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path:
        with suppress(FileNotFoundError), open(path, "a") as file:  # one that no longer waits has cleared it away
            file.write(f"{code}\n")
