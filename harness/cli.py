"""The command line: parse, call one function, print. No logic, and nothing heavy is imported for `--help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import harness
from harness.errors import EXIT_BAD_INPUT, EXIT_DONE, HarnessError, nearest

# Groups of `harness --help`, each command with its line.
GROUPS = {
    "Train": {
        "train": "train a recipe",
        "eval": "evaluate a run's checkpoint on its test split",
        "predict": "classify image files with a run's checkpoint",
    },
    "Look": {
        "summary": "a recipe's network: layers, receptive fields, constraints",
        "recipe": "show, validate or describe recipes",
        "data": "convert and verify data",
    },
    "Measure": {
        "bench": "measure the loaders beside their peers",
        "doctor": "what this machine has; --numerics checks its kernels",
    },
}
EXIT_CODE_FILE = "HARNESS_EXIT_CODE_FILE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 bad input, 3 diverged, 130 interrupted."""
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
    except HarnessError as error:
        _print_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; --resume auto goes on from the last checkpoint", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    _tell_launcher(code)
    return code


def _run(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise HarnessError(f'unknown command "{argv[0]}"', hint=nearest(argv[0], COMMANDS))
    arguments, unknown = _parser().parse_known_args(argv)
    _take_overrides(arguments, unknown)
    return int(arguments.run(arguments))


def _print_error(error: HarnessError) -> None:
    rank = os.environ.get("RANK", "0")
    # Ranks that fail alike say it once: the others in one line.
    text = f"ERROR {error}" if rank == "0" else f"ERROR (rank {rank}) {str(error).splitlines()[0]}"
    print(text, file=sys.stderr, flush=True)


def _tell_launcher(code: int) -> None:
    """Launchers of several ranks return 1 whatever a rank returned; launch.sh reads the code from this file."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path and code != EXIT_DONE:
        with open(path, "a") as file:
            file.write(f"{code}\n")


class _Parser(argparse.ArgumentParser):
    """Bad options are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise HarnessError(f"{self.prog}: {message}", hint=f"See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    lines = [
        f"{group}:\n" + "\n".join(f"  {name:<10}{text}" for name, text in commands.items())
        for group, commands in GROUPS.items()
    ]
    parser = _Parser(
        prog="harness",
        description=f"{harness.__doc__}\n\n" + "\n\n".join(lines),
        epilog="harness COMMAND --help tells more about one. Exit codes: 0 done, 2 bad recipe, option or data,\n"
        "3 diverged, 75 stopped by a signal with a checkpoint written.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="harness [--version] COMMAND …",
    )
    parser.add_argument("--version", action="version", version=f"harness {harness.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, help=argparse.SUPPRESS, metavar="COMMAND")
    for name, (text, build) in COMMANDS.items():
        build(commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return parser


def _take_overrides(arguments: argparse.Namespace, unknown: list[str]) -> None:
    """Overrides may stand before or behind options; anything else that is left over is a mistake."""
    options = [a for a in unknown if a.startswith("-")]
    takes = hasattr(arguments, "overrides")
    if options or (unknown and not takes):
        wrong = (options or unknown)[0]
        raise HarnessError(
            f'unknown argument "{wrong}"',
            hint=f"See harness {arguments.command} --help; overrides are key.path=value.",
        )
    if takes:
        arguments.overrides = [*arguments.overrides, *unknown]


def _recipe_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs="?" if optional else None, help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change a setting, e.g. training.epochs=2"
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_path", metavar="RUN", type=Path, help="a run directory, or one of its checkpoints")


def _add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last (default), best or step_N")


def _add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


# --- train, eval, predict


def _build_train(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where to write (default runs/<recipe>/<run-id>)")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|PATH",
        help="go on from the last good checkpoint, start anew (default), or from a checkpoint or run",
    )
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from harness.recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    from harness.training.run import train

    result = train(recipe, run_directory=arguments.run_dir, resume=arguments.resume)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"test accuracy {result['correct']}/{result['total']} ({result['accuracy']:.2%}), "
            f"best {result['best']['accuracy']:.2%} at epoch {result['best']['epoch']:g}\n{result['run_directory']}"
        )
    return EXIT_DONE


def _build_eval(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    _add_checkpoint_option(parser)
    _add_json_option(parser)
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from harness.training.finished import evaluate_run

    result = evaluate_run(arguments.run_path, which=arguments.checkpoint)
    if not result.pop("is_main"):
        return EXIT_DONE
    if arguments.json:
        _print_json(result)
        return EXIT_DONE
    print(f"{result['checkpoint']} (step {result['step']})")
    for split in ("test", "test_ema"):
        if split in result:
            score = result[split]
            print(
                f"{split}: accuracy {score['accuracy']} ({score['correct']}/{score['total']}), loss {score['loss']:.6f}"
            )
    return EXIT_DONE


def _build_predict(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files")
    _add_checkpoint_option(parser)
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="which weights (default raw)")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes to name (default 3)")
    _add_json_option(parser)
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from harness.training.finished import predict

    predictions = predict(
        arguments.run_path,
        arguments.images,
        which=arguments.checkpoint,
        weights=arguments.weights,
        top=arguments.top,
    )
    if arguments.json:
        _print_json([{"image": p.image, "classes": dict(p.classes)} for p in predictions])
    else:
        for p in predictions:
            print(f"{p.image}: " + ", ".join(f"{name} {probability:.2%}" for name, probability in p.classes))
    return EXIT_DONE


# --- summary, recipe, data


def _build_summary(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    _add_json_option(parser)
    parser.set_defaults(run=_summary)


def _summary(arguments: argparse.Namespace) -> int:
    from harness.recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    from harness.models.build import build_model
    from harness.models.inspect import render_report, report_json

    size = recipe.data.image_size_px
    model = build_model(
        recipe.model.name,
        num_classes=recipe.data.num_classes or 10,
        image_size_px=size,
        args=recipe.model.args,
    )
    if arguments.json:
        _print_json(report_json(model, (3, size, size)))
    else:
        print(render_report(model, (3, size, size)))
    return EXIT_DONE


def _build_recipe(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="the whole recipe, inheritance and defaults resolved")
    _recipe_arguments(show)
    show.set_defaults(run=_recipe_show)
    validate = actions.add_parser("validate", help="every error of some recipes")
    validate.add_argument("recipes", nargs="+", metavar="RECIPE")
    validate.set_defaults(run=_recipe_validate)
    schema = actions.add_parser("schema", help="JSON Schema of recipes, for editors")
    schema.set_defaults(run=_recipe_schema)


def _recipe_show(arguments: argparse.Namespace) -> int:
    from harness.recipe import load
    from harness.recipe.loading import resolved_yaml

    print(resolved_yaml(load(arguments.recipe, arguments.overrides)), end="")
    return EXIT_DONE


def _recipe_validate(arguments: argparse.Namespace) -> int:
    from harness.recipe import load

    code = EXIT_DONE
    for path in arguments.recipes:
        try:
            load(path)
            print(f"{path}: valid")
        except HarnessError as error:
            _print_error(error)
            code = EXIT_BAD_INPUT
    return code


def _recipe_schema(arguments: argparse.Namespace) -> int:
    from harness.recipe.loading import json_schema

    _print_json(json_schema())
    return EXIT_DONE


def _build_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="convert a recipe's data (training does it by itself)")
    _recipe_arguments(prepare)
    prepare.add_argument("--force", action="store_true", help="convert again even if it is there")
    prepare.set_defaults(run=_data_prepare)
    verify = actions.add_parser("verify", help="check all converted data against its manifests")
    verify.set_defaults(run=_data_verify)


def _data_prepare(arguments: argparse.Namespace) -> int:
    from harness.recipe import load

    data = load(arguments.recipe, arguments.overrides).data
    from harness.data.prepare import prepare

    store = prepare(
        data.source,
        path=data.path,
        image_size_px=data.image_size_px,
        synthetic=data.synthetic.model_dump(),
        force=arguments.force,
    )
    _print_json({"directory": str(store.directory), **store.manifest.to_json()})
    return EXIT_DONE


def _data_verify(arguments: argparse.Namespace) -> int:
    from harness.data.prepare import list_stores, verify

    problems = 0
    for store in list_stores():
        found = verify(store)
        problems += len(found)
        print(f"{store}: " + ("; ".join(map(str, found)) if found else "whole"))
    return EXIT_BAD_INPUT if problems else EXIT_DONE


# --- bench, doctor


def _build_bench(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    loader = actions.add_parser("loader", help="images a second of our loaders, torchvision's and stock FFCV's")
    loader.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, peers in turn (default 5)")
    loader.add_argument("--workers", type=int, default=None, metavar="N", help="threads or processes (all cores)")
    _add_json_option(loader)
    loader.set_defaults(run=_bench_loader)


def _bench_loader(arguments: argparse.Namespace) -> int:
    from harness.benchmarks.loader import bench_loader, render

    result = bench_loader(rounds=arguments.rounds, workers=arguments.workers)
    if arguments.json:
        _print_json(result)
    else:
        print(render(result))
    return EXIT_DONE


def _build_doctor(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser, optional=True)
    parser.add_argument(
        "--numerics",
        action="store_true",
        help="run each layer of the recipe's network against a float64 reference, anew",
    )
    _add_json_option(parser)
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from harness.doctor import examine, examine_numerics, render

    if arguments.numerics:
        from harness.recipe import load

        if arguments.recipe is None:
            raise HarnessError("--numerics needs a recipe", hint="harness doctor --numerics recipes/seed.yaml")
        report = examine_numerics(load(arguments.recipe, arguments.overrides))
        if arguments.json:
            _print_json(report.to_json())
        else:
            print(report.render())
        return EXIT_DONE
    facts = examine()
    if arguments.json:
        _print_json(facts)
    else:
        print(render(facts))
    return EXIT_DONE


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    name: (text, globals()[f"_build_{name}"]) for group in GROUPS.values() for name, text in group.items()
}
