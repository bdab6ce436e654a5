"""README's commands run, every command of the documentation is one that there is, and links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from harness.cli import parser_of
from tests.conftest import run_limited

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCH, RECIPES = ROOT / "launch.sh", ROOT / "recipes"
HARNESS = f"{sys.executable} -m harness"
# README's commands, and what is put in place of what takes minutes, a GPU, a cluster or the real CIFAR-10.
RUN: dict[str, str | None] = {
    "./launch.sh recipes/quickstart.yaml": f"{LAUNCH} {RECIPES}/quickstart.yaml --ranks 1 training.epochs=1",
    "./launch.sh recipes/seed.yaml training.epochs=2": f"env DRY_RUN=1 {LAUNCH} {RECIPES}/seed.yaml",
    "time ./launch.sh recipes/quickstart.yaml": None,  # the first again
    "accelerate launch --config_file recipes/launch/multi_gpu.yaml --num_processes 8"
    " -m harness train recipes/seed.yaml": (
        f"env ACCELERATE_USE_CPU=true {sys.executable} -m accelerate.commands.launch "
        f"--config_file {RECIPES}/launch/cpu.yaml --num_processes 2 -m harness train {RECIPES}/debug.yaml"
    ),
    "harness submit recipes/seed.yaml --nodes 2 --gpus-per-node 8 --time 4:00:00": (
        f"{HARNESS} submit {RECIPES}/seed.yaml --nodes 2 --gpus-per-node 8 --time 4:00:00 --dry-run"
    ),
    "harness train recipes/debug.yaml": f"{HARNESS} train {RECIPES}/debug.yaml",
    "harness doctor --numerics recipes/debug.yaml": f"{HARNESS} doctor --numerics {RECIPES}/debug.yaml",
    "./scripts/test.sh": None,  # this test is part of it
    "./scripts/check.sh": f"test -x {ROOT}/scripts/check.sh",
}


def commands_of(page: Path) -> list[str]:
    """What stands after `$ ` in a page's console blocks, without comments and variables set before it."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [
        line[2:].split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("$ ")
    ]
    return [re.sub(r"^(\w+=\S+ )+", "", line) for line in lines]


def test_every_command_of_the_readme_is_run() -> None:
    assert set(commands_of(ROOT / "README.md")) == set(RUN)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command, here in RUN.items() if here])
def test_commands_of_the_readme(command: str, tmp_path: Path) -> None:
    environment = os.environ | {"HARNESS_SKIP_SETUP": "1", "HARNESS_VENV": sys.prefix}
    done = run_limited(shlex.split(str(RUN[command])), 250, environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def _harness_commands(page: Path) -> list[str]:
    return [c for c in commands_of(page) if c.startswith("harness ")]


@pytest.mark.parametrize("page", [p for p in PAGES if _harness_commands(p)], ids=lambda p: p.stem)
def test_commands_of_the_documentation_are_valid(page: Path) -> None:
    for command in _harness_commands(page):
        plain = re.sub(r"\[[^\]]*\]|…", "", re.split(" > |  ", command)[0])  # what may be left out
        name, *words = shlex.split(plain)[1:]
        parser_of(name).parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
