"""The commands: each declares its arguments, calls one function, and prints what it returns.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from harness import signals
from harness.errors import EXIT_BAD_INPUT, EXIT_DONE, HarnessError, print_error
from harness.files import expand


def _recipe_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?" if optional else None,
        help="a YAML file, or the name of a packaged recipe",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="change a setting, e.g. training.epochs=2"
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_path", metavar="RUN", type=Path, help="a run directory, or one of its checkpoints")


def _add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last (default), best or step_N")


def _add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str, *, at_least: int = 0) -> int:
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least {at_least}, not "{text}"')
    return int(text)


def _path(text: str) -> Path:
    return Path(expand(text, where="--run-dir"))


def _image_file(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"reads files and downloads nothing; fetch it first: curl -LO {text}")
    return Path(text)


_at_least_one = partial(_count, at_least=1)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def build_train(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--run-dir", type=_path, metavar="DIR", help="where to write (default runs/<recipe>/<run-id>)")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|PATH",
        help="go on from the last good checkpoint, start anew (default), or from a checkpoint or run",
    )
    parser.add_argument("--profile", action="store_true", help="time and trace some steps; see DIR/profile")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from harness.recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    with signals.noticed():  # from here on, before torch is imported
        from harness.training.run import train

        result = train(
            recipe,
            run_directory=arguments.run_dir,
            resume=arguments.resume,
            profile=arguments.profile,
            began_at=arguments.began_at,
        )
    if os.environ.get("RANK", "0") == "0":
        print(
            f"test accuracy {result['correct']}/{result['total']} ({result['accuracy']:.2%}), "
            f"best {result['best']['accuracy']:.2%} at epoch {result['best']['epoch']:g}\n{result['run_directory']}"
        )
    return EXIT_DONE


def build_eval(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    _add_checkpoint_option(parser)
    parser.add_argument(
        "--recalibrate",
        type=_count,
        default=0,
        metavar="N",
        help="take BatchNorm statistics anew over N training batches with dropout off (default: as saved)",
    )
    _add_json_option(parser)
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from harness.training.inference import evaluate_run

    result = evaluate_run(arguments.run_path, which=arguments.checkpoint, recalibrate_batches=arguments.recalibrate)
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
                f"{split}: accuracy {score['correct']}/{score['total']} ({score['accuracy']:.2%}), "
                f"loss {score['loss']:.6f}"
            )
    return EXIT_DONE


def build_predict(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=_image_file, help="image files")
    _add_checkpoint_option(parser)
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="which weights (default raw)")
    parser.add_argument("--top", type=_at_least_one, default=3, metavar="K", help="classes to name (default 3)")
    _add_json_option(parser)
    parser.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    from harness.training.inference import predict

    predictions = predict(
        arguments.run_path,
        arguments.images,
        which=arguments.checkpoint,
        weights=arguments.weights,
        top=arguments.top,
    )
    if arguments.json:
        _print_json(predictions)
    else:
        for each in predictions:
            found = ", ".join(f"{name} {probability:.2%}" for name, probability in each["classes"].items())
            print(f"{each['image']}: {found}")
    return EXIT_DONE


def build_summary(parser: argparse.ArgumentParser) -> None:
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


def build_recipe(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="the whole recipe, inheritance and defaults resolved")
    _recipe_arguments(show)
    show.set_defaults(run=_recipe_show)
    validate = actions.add_parser("validate", help="every error of some recipes")
    validate.add_argument("recipes", nargs="+", metavar="RECIPE", help="files, and key.path=value for all of them")
    validate.set_defaults(run=_recipe_validate)
    listing = actions.add_parser("list", help="the recipes that come with the package, for use by name from anywhere")
    listing.set_defaults(run=_recipe_list)
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
    overrides = [word for word in arguments.recipes if "=" in word and not Path(word).exists()]
    for path in [word for word in arguments.recipes if word not in overrides]:
        try:
            load(path, overrides)
            print(f"{path}: valid")
        except HarnessError as error:
            print_error(error)
            code = EXIT_BAD_INPUT
    return code


def _recipe_list(arguments: argparse.Namespace) -> int:
    from harness.recipe import packaged

    for name in packaged.names():
        print(f"{name:<12}{packaged.describe(name)}")
    print(f"files: {packaged.RECIPES}")
    return EXIT_DONE


def _recipe_schema(arguments: argparse.Namespace) -> int:
    from harness.recipe.loading import json_schema

    _print_json(json_schema())
    return EXIT_DONE


def build_data(parser: argparse.ArgumentParser) -> None:
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
        image_column=data.image_column,
        label_column=data.label_column,
        synthetic=data.synthetic.model_dump(),
        force=arguments.force,
    )
    print(f"{store.directory}\n{store.manifest.to_json()}")
    return EXIT_DONE


def _data_verify(arguments: argparse.Namespace) -> int:
    from harness.data.prepare import list_stores, verify

    problems = 0
    for store in list_stores():
        found = verify(store)
        problems += len(found)
        print(f"{store}: " + ("; ".join(map(str, found)) if found else "whole"))
    return EXIT_BAD_INPUT if problems else EXIT_DONE


def build_submit(parser: argparse.ArgumentParser) -> None:
    from harness.launching.submitting import add_options

    _recipe_arguments(parser)
    add_options(parser)
    parser.add_argument("--run-dir", type=_path, metavar="DIR", help="where to write (default runs/<recipe>/<run-id>)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script; nothing is written or submitted"
    )
    parser.set_defaults(run=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    from harness.launching.submitting import request_of, submit

    done = submit(
        arguments.recipe,
        arguments.overrides,
        run_directory=arguments.run_dir,
        dry_run=arguments.dry_run,
        request=request_of(arguments),
    )
    if done.job_id is None:
        print(done.text, end="")
        return EXIT_DONE
    print(f"job {done.job_id}")
    for run_directory, log in done.places():
        print(f"run directory {run_directory}\nlog {log}")
    return EXIT_DONE


def build_doctor(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser, optional=True)
    parser.add_argument(
        "--numerics",
        action="store_true",
        help="run each layer of the recipe's network against a float64 reference, anew",
    )
    _add_json_option(parser)
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from harness.doctor import examine, examine_network, render

    if arguments.numerics:
        from harness.recipe import load

        if arguments.recipe is None:
            raise HarnessError("--numerics needs a recipe", hint="harness doctor --numerics recipes/seed.yaml")
        network = examine_network(load(arguments.recipe, arguments.overrides))
        if arguments.json:
            _print_json({**network.numerics.to_json(), "kernels": network.kernels})
        else:
            print(f"{network.numerics.render()}\nkernels: {network.kernels}")
        return EXIT_DONE
    facts = examine()
    if arguments.json:
        _print_json(facts)
    else:
        print(render(facts))
    return EXIT_DONE
