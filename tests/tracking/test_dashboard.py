"""Dashboards as code: the specification, the package's object for it, and what is said where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.recipe import load
from harness.tracking.dashboard import build_workspace, of_project, specification
from tests.conftest import ROOT
from tests.tracking.door import Door

GOLDEN = ROOT / "tests" / "golden" / "dashboard.json"
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")


def spec_of(*overrides: str) -> dict[str, Any]:
    return specification(load(RECIPE, list(overrides)).model_dump(mode="json"))


def test_a_recipe_or_a_project_is_enough() -> None:
    """Averaged weights have curves where there may be any."""
    for spec in (spec_of("ema.decay=0.9"), of_project("team/cifar", [])):
        assert spec["sections"][0]["panels"][0]["y"] == ["test/accuracy", "test_ema/accuracy", "train/epoch_accuracy"]
    assert (spec["entity"], spec["project"]) == ("team", "cifar")
    assert of_project("cifar", [])["entity"] is None


def test_print_is_the_golden_one_and_needs_no_key_no_extra_and_nothing_heavy(tmp_path: Path) -> None:
    """After a change that is meant: harness dashboard recipes/quickstart.yaml --print > tests/golden/dashboard.json."""
    code = (
        "import sys\nfrom harness.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'numpy', 'wandb', 'wandb_workspaces'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    words = [sys.executable, "-c", code, "dashboard", RECIPE, "--print"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a/b/c"], '"a/b/c" is no project'),
        (["project", "seed=1"], '"seed=1" changes a recipe, and "project" is a project'),
        (["project"], "there is no W&B API key"),
        (["team/project"], "there is no W&B API key"),
    ],
)
def test_mistakes_are_reported(
    words: list[str], said: str, logged_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    assert main(["dashboard", *words]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "HINT:" in text


def test_without_the_extra_the_pip_line_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # as where it is not installed
    assert main(["dashboard", "project"]) == 2
    assert "HINT: pip install '.[dashboard]'" in capsys.readouterr().err


def test_the_package_takes_the_specification() -> None:
    pytest.importorskip("wandb_workspaces")
    spec = spec_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = build_workspace({**spec, "entity": "team"})._to_model()
    bank = view.spec.section.panel_bank_config.sections
    assert [section.name for section in bank] == [section["name"] for section in spec["sections"]]
    shown = view.spec.model_dump_json(by_alias=True)
    for panel in (panel for section in spec["sections"] for panel in section["panels"]):
        for metric in (*panel.get("y", ()), panel.get("metric"), panel.get("table")):
            assert metric is None or f'{metric}"' in shown


def test_a_server_without_workspaces_says_so(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """openwandb has none; saving one needs W&B's own servers."""
    pytest.importorskip("wandb_workspaces")
    assert main(["dashboard", RECIPE]) == 1
    text = capsys.readouterr().err
    assert "the server does not take the workspace" in text
    assert "--print shows what would be written" in text
    sys.modules["wandb"].teardown()
