"""The rules of the house that a machine can hold: who imports whom, sizes, no unsafe loading, nothing left out."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "harness").rglob("*.py"))
CPP_FILES = sorted(p for kind in ("*.cpp", "*.h") for p in (ROOT / "harness").rglob(kind))
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60

# Each room and the rooms it may import. A module with its own entry is a room of its own, and who may import the
# room around it may import it too.
GROUND = {"environment", "errors", "files", "locks", "machine", "network", "run_directory", "signals", "srun"}
WORK = GROUND | {"recipe", "models", "data", "tracking", "preflight", "heartbeat", "runtime", "runs", "training"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": GROUND,
    "environment": {"errors"},
    "machine": set(),
    "signals": set(),
    "network": set(),
    "locks": {"errors", "run_directory"},
    "run_directory": set(),
    "srun": set(),
    "recipe.dual_branch_args": GROUND,  # the schema of the network's settings: recipes are checked with it
    "recipe": GROUND,
    "models": GROUND | {"recipe.dual_branch_args"},
    "data": GROUND,
    "tracking": GROUND,
    "recipe.packaged": set(),
    "recipe.document": GROUND | {"recipe.packaged"},
    "runs": GROUND | {"tracking", "recipe.document"},
    "preflight": GROUND,
    "heartbeat": GROUND,
    "runtime": GROUND | {"data", "preflight", "heartbeat"},
    "training": WORK,
    "launching": WORK,
    "launching.ports": set(),
    "launching.trial": GROUND,  # processes for a measurement, whoever makes it
    "report": WORK,
    "scaling": WORK,
    "sweeps": WORK | {"launching"},
    "bench": WORK | {"launching.ports"},
    "doctor": WORK,
    "commands": WORK | {"launching", "doctor"},
    "commands_speed": WORK | {"bench", "scaling"},
    "commands_look": WORK | {"report"},
    "commands_sweep": WORK | {"launching", "report", "sweeps"},
    "commands_track": WORK,
    "cli": GROUND | {"commands", "commands_look", "commands_speed", "commands_sweep", "commands_track"},
    "__main__": {"cli"},
    "__init__": set(),
}
FFCV_FILES = {"harness/data/ffcv_loader.py"}
UNSAFE_CALLS = {
    "torch.load": "weights are safetensors",
    "yaml.full_load": "YAML is safe-loaded",
    "yaml.unsafe_load": "YAML is safe-loaded",
    "yaml.load_all": "YAML is safe-loaded",
    "eval": "it runs what it reads",
    "exec": "it runs what it reads",
}
# Whatever they read, they run. State is safetensors and JSON.
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Its CIFAR10 unpickles the makers' own archive, once the published MD5 is confirmed: there and nowhere else.
UNPICKLES, MAY_UNPICKLE = "torchvision.datasets", ROOT / "harness" / "data" / "cifar10.py"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def room_of(module: str) -> str:
    """The room of a dotted name below harness: the longest entry that it begins with, else its first word."""
    matching = [room for room in MAY_IMPORT if module == room or module.startswith(f"{room}.")]
    return max(matching, key=len, default=module.split(".")[0])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "harness").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import; write harness.…"
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def targets_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours."""
    for line, name in imports_of(path):
        if name.startswith("harness.") and name != "harness.__version__":
            yield line, room_of(name.removeprefix("harness."))


def calls_of(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call with its dotted name as written, import aliases undone."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            aliases |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            head, _, tail = ast.unparse(node.func).partition(".")
            yield node, ".".join(filter(None, (aliases.get(head, head), tail)))


def test_there_is_a_house_to_look_at() -> None:
    """The other tests loop over files; a wrong folder would let them all pass."""
    assert {
        "harness/errors.py",
        "harness/models/kernels/kernels.cpp",
        "harness/data/order.py",
        "harness/launching/local.py",
    } <= set(map(name_of, FILES + CPP_FILES))
    unknown = {name_of(path): room_of(module_of(path)) for path in FILES if room_of(module_of(path)) not in MAY_IMPORT}
    assert not unknown, f"rooms without rules, add them to MAY_IMPORT: {unknown}"


def test_every_folder_is_a_package() -> None:
    assert [name_of(path.parent) for path in FILES if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(module_of(path))
    wrong = [f"line {line}: {room} imports {target}" for line, target in targets_of(path)
             if not may_import(room, target)]  # fmt: skip
    assert wrong == []


def may_import(room: str, target: str) -> bool:
    return any(target == allowed or target.startswith(f"{allowed}.") for allowed in {room, *MAY_IMPORT[room]})


def test_the_direction_test_sees_a_wrong_import(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "def f():\n    from harness.cli import main\nfrom harness import recipe\nimport harness.data.order\n"
    )
    assert sorted(targets_of(file)) == [(2, "cli"), (3, "recipe"), (4, "data")]
    assert not may_import("training", "cli")


def test_networks_know_the_schema_of_their_settings_and_no_more_of_recipes() -> None:
    assert may_import("models", room_of("recipe.dual_branch_args.DualBranchArgs"))
    assert not may_import("models", room_of("recipe.schema.Recipe"))
    assert may_import("recipe", room_of("recipe.dual_branch_args"))
    assert not may_import("recipe.dual_branch_args", room_of("recipe.schema"))
    assert not may_import("recipe", room_of("models.dual_branch"))


@pytest.mark.parametrize(("package", "allowed"), [("ffcv", FFCV_FILES), ("wandb", "harness/tracking/")])
def test_a_package_has_one_door(package: str, allowed: set[str] | str) -> None:
    users = {name_of(path) for path in FILES for _, name in imports_of(path) if name.split(".")[0] == package}
    if isinstance(allowed, str):
        assert users
        assert {user for user in users if not user.startswith(allowed)} == set()
    else:
        assert users
        assert users <= allowed


@pytest.mark.parametrize("path", CPP_FILES, ids=name_of)
def test_sizes_of_compiled_files(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines: find the missing room"
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno is not None}
    assert {name: length for name, length in long.items() if length > MAX_FUNCTION_LINES} == {}


def unsafe_loads(path: Path) -> list[str]:
    """Calls that could run what they read."""
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            if bases & safe_loaders:
                safe_loaders.add(node.name)
    found = [f"line {n}: {name}" for n, name in imports_of(path) if name.split(".")[0] in UNSAFE_MODULES]
    if path != MAY_UNPICKLE:
        found += [f"line {n}: {name}" for n, name in imports_of(path) if name.startswith(UNPICKLES)]
    for call, name in calls_of(path):
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        why = UNSAFE_CALLS.get(name)
        if name == "yaml.load":
            loader = words.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "none")
            why = None if loader in safe_loaders else "YAML is safe-loaded"
        elif name.split(".")[-1] == "load" and words.get("allow_pickle") == "True":
            why = "no pickle in arrays"
        if why:
            found.append(f"line {call.lineno}: {name}: {why}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_loads_what_could_run_code(path: Path) -> None:
    assert unsafe_loads(path) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('x')",
        "from torch import load\nload('x')",
        "import pickle as p\np.loads(b'')",
        "import yaml\nyaml.load('x', Loader=yaml.Loader)",
        "import yaml\nyaml.load('x', yaml.UnsafeLoader)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import pickle\nclass U(pickle.Unpickler): pass",
        "from pickle import Unpickler\nclass U(Unpickler): pass",
        "import shelve\nshelve.open('x')",
        "eval('1')",
        "import dill",
        "from torchvision.datasets import CIFAR10",
    ],
)
def test_the_loading_test_sees_unsafe_code(tmp_path: Path, code: str) -> None:
    file = tmp_path / "unsafe.py"
    file.write_text(code + "\n")
    assert len(unsafe_loads(file)) == 1


def test_what_runs_nothing_is_not_reported(tmp_path: Path) -> None:
    file = tmp_path / "safe.py"
    file.write_text("import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load('x', Loader=L)\nyaml.safe_load('x')\n")
    assert unsafe_loads(file) == []


@pytest.mark.parametrize(
    "script", ["launch.sh", ".ci/run", *(f"scripts/{p.name}" for p in (ROOT / "scripts").glob("*.sh"))]
)
def test_scripts_are_executable_and_stop_at_the_first_error(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_the_sandbox_is_executable() -> None:
    path = ROOT / "scripts" / "slurm_sandbox"
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize(
    "module",
    [
        "harness.recipe",
        "harness.launching.local",
        "harness.launching.ranks",
        "harness.launching.submitting",
        "harness.sweeps.spec",
        "harness.sweeps.run",
    ],
)
def test_what_runs_before_training_does_not_import_torch(module: str) -> None:
    """Recipes are checked and remembered splits are read in milliseconds, torch takes a second or more."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
