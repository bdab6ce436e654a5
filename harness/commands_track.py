"""The commands about Weights & Biases: `track` uploads runs, `dashboard` writes a workspace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.errors import EXIT_DONE


def build_track(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    sync = actions.add_parser("sync", help="bring W&B up to metrics.jsonl: what is there already is not sent again")
    sync.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory")
    sync.add_argument(
        "--rebuild", action="store_true", help="upload it whole as a new W&B run, whatever the old one holds"
    )
    sync.set_defaults(run=_track_sync)


def _track_sync(arguments: argparse.Namespace) -> int:
    from harness.tracking.wandb_sync import sync_runs

    return sync_runs(arguments.runs, rebuild=arguments.rebuild)


def build_dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="RECIPE|PROJECT", help="a YAML file, or a W&B project: [entity/]project")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="change a setting of the recipe"
    )
    parser.add_argument("--print", action="store_true", help="show the specification; needs no key and no extra")
    parser.set_defaults(run=_dashboard)


def _dashboard(arguments: argparse.Namespace) -> int:
    from harness.tracking.dashboard import of_project, specification, write_workspace

    if Path(arguments.what).suffix in (".yaml", ".yml"):
        from harness.recipe import load

        spec = specification(load(arguments.what, arguments.overrides).model_dump(mode="json"))
    else:
        spec = of_project(arguments.what, arguments.overrides)
    if arguments.print:
        print(json.dumps(spec, indent=2))
        return EXIT_DONE
    print(write_workspace(spec))
    return EXIT_DONE
