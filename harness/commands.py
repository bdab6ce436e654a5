"""What each command does: call one function and print what it returns. Nothing heavy is imported before that."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import signals
from harness.errors import EXIT_BAD_INPUT, EXIT_DONE, HarnessError, print_error
from harness.files import write_text

WATCH_SECONDS = 3.0


def show(arguments: Namespace, result: Any, render: Callable[[Any], str]) -> None:
    """Print a result as JSON where that is asked for, else as text."""
    print(as_json(result) if arguments.json else render(result))


def as_json(data: Any) -> str:
    """With null for NaN and infinity, which JSON does not have."""
    return json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None), indent=2)


def load_recipe(arguments: Namespace) -> Any:
    """The recipe that a command names, with its overrides."""
    from harness.recipe import load

    return load(arguments.recipe, arguments.overrides)


def _width() -> int | None:
    """Columns of the terminal; None where the output is read by something else."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def train(arguments: Namespace) -> None:
    from harness.recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    with signals.noticed():  # from here on, before torch is imported
        from harness.training.run import train

        how = {"resume": arguments.resume, "profile": arguments.profile, "began_at": arguments.began_at}
        result = train(recipe, run_directory=arguments.run_dir, **how)
    if os.environ.get("RANK", "0") == "0":
        best = result["best"]
        print(f"test {_answers(result)}, best {best['accuracy']:.2%} at epoch {best['epoch']:g}")
        print(result["run_directory"])


def _answers(score: dict[str, Any]) -> str:
    return f"accuracy {score['correct']}/{score['total']} ({score['accuracy']:.2%})"


def evaluate(arguments: Namespace) -> None:
    from harness.training.inference import evaluate_run

    result = evaluate_run(arguments.run_path, which=arguments.checkpoint, recalibrate_batches=arguments.recalibrate)
    if not result.pop("is_main"):
        return
    scores = {name: result[name] for name in ("test", "test_ema") if name in result}
    lines = [f"{name}: {_answers(score)}, loss {score['loss']:.6f}" for name, score in scores.items()]
    show(arguments, result, lambda _: "\n".join([f"{result['checkpoint']} (step {result['step']})", *lines]))


def predict(arguments: Namespace) -> None:
    from harness.training import inference

    which = {"which": arguments.checkpoint, "weights": arguments.weights, "top": arguments.top}
    predictions = inference.predict(arguments.run_path, arguments.images, **which)
    answers = [", ".join(f"{name} {share:.2%}" for name, share in each["classes"].items()) for each in predictions]
    lines = [f"{each['image']}: {answer}" for each, answer in zip(predictions, answers, strict=True)]
    show(arguments, predictions, lambda _: "\n".join(lines))


def lr_find(arguments: Namespace) -> None:
    recipe = load_recipe(arguments)
    from harness.report import page, terminal
    from harness.training.lr_finder import find_lr

    if arguments.html:
        page.check_target(arguments.html)
    found = find_lr(recipe, min_lr=arguments.min_lr, max_lr=arguments.max_lr, steps=arguments.steps)
    if arguments.html:
        write_text(arguments.html, terminal.curve_page(found, recipe.name))
    look: dict[str, Any] = {"size": shutil.get_terminal_size(), "colours": terminal.has_colours()}
    text = f"{terminal.render_curve(found, **look)}\n{terminal.render_suggestions(found)}"
    show(arguments, found.to_json(), lambda _: text)


def sweep(arguments: Namespace) -> int | None:
    from harness.sweeps import run, spec, table

    run.refuse_lost_options(arguments)
    sweep = spec.load_sweep(arguments.sweep)
    run.check_unchanged(sweep)
    if arguments.slurm:
        return _sweep_on_cluster(sweep, arguments)
    if arguments.wandb_agent:
        return run.run_wandb_agent(sweep, arguments.wandb_agent)
    if arguments.wandb:
        return _sweep_on_server(sweep, arguments)
    code = None
    if not arguments.table:
        ranks = run.ranks_for(sweep, arguments.ranks, measure=not arguments.dry_run)
        queued = run.queued_runs(sweep)
        if arguments.dry_run:
            plan, command = table.statuses(sweep, queued), ranks.command(run.training_words(sweep, sweep.runs[0]))
            show(arguments, table.plan_json(plan), lambda _: f"{table.render_plan(plan)}\n{shlex.join(command)}")
            return None
        code = run.run_here(sweep, ranks, retry_failed=arguments.retry_failed, quiet=arguments.json, queued=queued)
    show(arguments, table.table_json(sweep, table.statuses(sweep, run.queued_runs(sweep))), table.render_table)
    return code


def _sweep_on_cluster(sweep: Any, arguments: Namespace) -> int:
    from harness.launch.slurm import request_of
    from harness.sweeps import run

    request = request_of(arguments)
    run.check_ranks(sweep, request.ranks)
    how = {"retry_failed": arguments.retry_failed, "dry_run": arguments.dry_run}
    script, job_id, tasks = run.submit(sweep, request=request, **how)
    if arguments.json:
        print(as_json({"job": job_id, "runs": tasks}))
    elif job_id is None:
        print(script or "no run is due: all are finished, failed, running or queued\n", end="")
    else:
        _print_job(job_id, [(task["run_directory"], task["log"]) for task in tasks])
    return EXIT_DONE


def _sweep_on_server(sweep: Any, arguments: Namespace) -> int:
    from harness.recipe.document import dump
    from harness.sweeps import run
    from harness.tracking.wandb_run import create_sweep

    found = run.wandb_configuration(sweep, run.ranks_for(sweep, arguments.ranks, measure=not arguments.dry_run))
    if arguments.dry_run:
        show(arguments, found, lambda found: dump(found).rstrip())
    else:
        tracking = sweep.runs[0].recipe.tracking
        sweep_id = create_sweep(found, project=tracking.project, entity=tracking.entity)
        agent = f"harness sweep {shlex.quote(str(arguments.sweep))} --wandb-agent {sweep_id}"
        show(arguments, {"id": sweep_id, "agent": agent}, lambda made: "\n".join(made.values()))
    return EXIT_DONE


def submit(arguments: Namespace) -> None:
    from harness.launch import slurm

    how = {"run_directory": arguments.run_dir, "dry_run": arguments.dry_run}
    request = slurm.request_of(arguments, arguments.sbatch_options)
    script, job_id, tasks = slurm.submit(arguments.recipe, arguments.overrides, **how, request=request)
    if job_id is None:
        print(script, end="")
    else:
        _print_job(job_id, tasks)


def _print_job(job_id: str, places: list[tuple[Any, Any]]) -> None:
    print(f"job {job_id}", *(f"run directory {run}\nlog {log}" for run, log in places), sep="\n")


def summary(arguments: Namespace) -> None:
    recipe = load_recipe(arguments)
    from harness.models.build import build_model
    from harness.models.summary import render_report, report_json

    size_px, classes = recipe.data.image_size_px, recipe.data.num_classes or 10
    model = build_model(recipe.model.name, num_classes=classes, image_size_px=size_px, args=recipe.model.args)
    shape = (3, size_px, size_px)
    print(as_json(report_json(model, shape)) if arguments.json else render_report(model, shape))


def recipe_show(arguments: Namespace) -> None:
    from harness.recipe.loading import resolved_yaml

    print(resolved_yaml(load_recipe(arguments)), end="")


def recipe_validate(arguments: Namespace) -> int:
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


def recipe_list(arguments: Namespace) -> None:
    from harness.recipe.document import RECIPES, describe, packaged_names

    for name in packaged_names():
        print(f"{name:<12}{describe(name)}")
    print(f"files: {RECIPES}")


def recipe_schema(arguments: Namespace) -> None:
    from harness.recipe.loading import json_schema

    print(as_json(json_schema()))


def data_prepare(arguments: Namespace) -> None:
    data = load_recipe(arguments).data
    from harness.data.prepare import prepare

    what = data.model_dump(include={"path", "image_size_px", "image_column", "label_column", "synthetic"})
    store = prepare(data.source, **what, force=arguments.force)
    print(f"{store.directory}\n{store.manifest.to_json()}")


def data_verify(arguments: Namespace) -> int:
    from harness.data.prepare import list_prepared, verify

    code = EXIT_DONE
    for store in list_prepared():
        problems = verify(store)
        print(f"{store}: " + ("; ".join(map(str, problems)) or "whole"))
        code = EXIT_BAD_INPUT if problems else code
    return code


def report(arguments: Namespace) -> None:
    if arguments.port is not None and not arguments.serve:
        raise HarnessError("--port is for --serve", hint="Add --serve, or leave --port out.")
    from harness.report.reporter import Reporter, serve

    which = {"which": arguments.checkpoint, "weights": arguments.weights}
    reporter = Reporter(arguments.run_path, **which, output=arguments.output)
    if arguments.serve:
        serve(reporter, port=arguments.port or 0)
    else:
        for problem in reporter.write():
            print(f"WARNING {problem}", file=sys.stderr)
        print(f"{reporter.file} ({reporter.file.stat().st_size / 1e6:.2f} MB)")


def runs(arguments: Namespace) -> None:
    from harness.report import terminal
    from harness.runs import list_runs

    runs = list_runs(arguments.directory, recipe=arguments.recipe)
    found = {
        "directory": str(arguments.directory),
        "order": terminal.ORDER,
        "runs": [terminal.as_json(r) for r in runs],
    }
    show(arguments, found, lambda _: terminal.render(runs, arguments.directory, width=_width()))


def curves(arguments: Namespace) -> None:
    from harness.report import terminal

    what, colours = terminal.parse_what(arguments.what), terminal.has_colours()

    def draw() -> tuple[str, bool]:
        return terminal.draw_runs(arguments.run_paths, what, size=shutil.get_terminal_size(), colours=colours)

    if arguments.watch:
        terminal.watch(draw, seconds=WATCH_SECONDS, clear=sys.stdout.isatty())
    else:
        print(draw()[0])


def compare(arguments: Namespace) -> None:
    from harness.report import compare, comparison_view, page

    if arguments.html:
        page.check_target(arguments.html)
    found = compare.compare(arguments.run_paths, checkpoint=arguments.checkpoint, weights=arguments.weights)
    if arguments.html:
        write_text(arguments.html, comparison_view.comparison_page(found))
    written = f"\n\n{arguments.html}" if arguments.html else ""
    show(arguments, found.to_json(), lambda _: comparison_view.render(found, width=_width()) + written)


def track_sync(arguments: Namespace) -> int:
    from harness.tracking.wandb_sync import sync_runs

    return sync_runs(arguments.run_paths, rebuild=arguments.rebuild)


def dashboard(arguments: Namespace) -> None:
    from harness.recipe import load
    from harness.tracking.dashboard import of_project, specification, write_workspace

    if Path(arguments.what).suffix in (".yaml", ".yml"):
        spec = specification(load(arguments.what, arguments.overrides).model_dump(mode="json"))
    else:
        spec = of_project(arguments.what, arguments.overrides)
    print(as_json(spec) if arguments.print else write_workspace(spec))


def bench(arguments: Namespace) -> None:
    from harness.bench import loader, render, step

    if arguments.action == "loader":
        result = loader.bench_loader(rounds=arguments.rounds, workers=arguments.workers)
    else:
        result = step.bench_step(rounds=arguments.rounds, batch_size=arguments.batch_size)
    show(arguments, result, render)


def scale(arguments: Namespace) -> None:
    from harness import scaling

    network = scaling.parse_network(arguments.network, gpus_per_node=arguments.gpus_per_node)
    result = scaling.scale(load_recipe(arguments), arguments.gpus, network, step_ms=arguments.step_ms)
    show(arguments, result, scaling.render)


def doctor(arguments: Namespace) -> None:
    from harness.doctor import examine, examine_network, render

    if not arguments.numerics:
        show(arguments, examine(), render)
    elif arguments.recipe is None:
        raise HarnessError("--numerics needs a recipe", hint="harness doctor --numerics recipes/seed.yaml")
    else:
        network = examine_network(load_recipe(arguments))
        found = {**network.numerics.to_json(), "kernels": network.kernels}
        show(arguments, found, lambda _: f"{network.numerics.render()}\nkernels: {network.kernels}")
