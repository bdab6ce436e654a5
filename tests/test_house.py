"""The rules of the house that a machine can hold: who imports whom, sizes, no unsafe loading, nothing left out."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "harness").rglob("*.py"))
CPP_FILES = sorted(p for kind in ("*.cpp", "*.h") for p in (ROOT / "harness").rglob(kind))
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60

# Each room and the rooms it may import. A module with its own entry is a room of its own, and who may import the
# room around it may import it too.
GROUND = {"distributed.heartbeat", "environment", "errors", "files", "machine", "signals", "launch.rank_env"}
WORK = GROUND | {"recipe", "models", "data", "tracking", "distributed", "runs", "training"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "environment": {"errors"},
    "machine": set(),
    "signals": set(),
    "recipe.schema": GROUND,  # of the network's settings too: recipes are checked with it
    "recipe": GROUND,
    "models": GROUND | {"recipe.schema"},
    "data": GROUND,
    "tracking": GROUND,
    "tracking.wandb_artifacts": WORK,
    "tracking.wandb_sync": WORK,
    "runs": GROUND | {"recipe", "tracking"},
    "distributed.heartbeat": {"errors"},  # torch-free: launchers choose the network interface by it
    "distributed": GROUND | {"data"},
    "training": WORK,
    "launch": WORK | {"bench"},
    "launch.rank_env": set(),
    "report": WORK,
    "scaling": WORK,
    "sweeps": WORK | {"launch"},
    "bench": WORK | {"launch.rank_env"},
    "doctor": WORK,
    "commands": WORK | {"launch", "sweeps", "report", "scaling", "bench", "doctor"},
    "cli": GROUND | {"commands", "launch", "runs"},
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


@cache
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
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives a.b."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import; write harness.…"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def targets_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours."""
    for line, name in imports_of(path):
        if name.startswith("harness.") and name != "harness.__version__":
            yield line, room_of(name.removeprefix("harness."))


def calls_of(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call with its dotted name as written, import aliases undone."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree_of(path)):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            name = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            first = name if alias.asname or isinstance(node, ast.ImportFrom) else name.split(".")[0]
            aliases[alias.asname or first.split(".")[-1]] = first
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            head, _, tail = ast.unparse(node.func).partition(".")
            yield node, ".".join(filter(None, (aliases.get(head, head), tail)))


def may_import(room: str, target: str) -> bool:
    return any(target == allowed or target.startswith(f"{allowed}.") for allowed in {room, *MAY_IMPORT[room]})


def wrong_imports(path: Path, room: str) -> list[str]:
    return [
        f"line {line}: {room} imports {target}" for line, target in targets_of(path) if not may_import(room, target)
    ]


def too_large(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    found = [f"{len(lines)} lines: find the missing room"] if len(lines) > MAX_FILE_LINES else []
    if path.suffix != ".py":
        return found + [f"line {n} is too long" for n, line in enumerate(lines, 1) if len(line) > 120]
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    return found + [f"{name} has {n} lines" for name, n in lengths.items() if n > MAX_FUNCTION_LINES]


def unsafe_loads(path: Path) -> list[str]:
    """Calls that could run what they read."""
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & safe_loaders:
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


def test_there_is_a_house_to_look_at() -> None:
    """The other tests loop over files; a wrong folder would let them all pass."""
    known = {"harness/errors.py", "harness/models/kernels/kernels.cpp", "harness/data/order.py", "harness/cli.py"}
    assert known <= set(map(name_of, FILES + CPP_FILES))
    unknown = {name_of(path): room_of(module_of(path)) for path in FILES if room_of(module_of(path)) not in MAY_IMPORT}
    assert not unknown, f"rooms without rules, add them to MAY_IMPORT: {unknown}"
    assert [name_of(path.parent) for path in FILES if not (path.parent / "__init__.py").exists()] == []


def test_imports_go_one_way_and_what_could_run_code_is_not_loaded_and_rooms_are_small() -> None:
    imports = {name_of(path): wrong_imports(path, room_of(module_of(path))) for path in FILES}
    loads = {name_of(path): unsafe_loads(path) for path in FILES}
    sizes = {name_of(path): too_large(path) for path in FILES + CPP_FILES}
    assert [
        f"{name}: {what}" for found in (imports, loads, sizes) for name, wrong in found.items() for what in wrong
    ] == []


def test_the_direction_test_sees_a_wrong_import(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "def f():\n    from harness.cli import main\nfrom harness import recipe\nimport harness.data.order\n"
    )
    assert sorted(targets_of(file)) == [(2, "cli"), (3, "recipe"), (4, "data")]
    assert len(wrong_imports(file, "training")) == 1
    assert may_import("models", room_of("recipe.schema.DualBranchArgs"))
    assert not may_import("models", room_of("recipe.loading.load"))
    assert not may_import("recipe", room_of("models.dual_branch"))


def test_a_package_has_one_door() -> None:
    users: dict[str, set[str]] = {"ffcv": set(), "wandb": set()}
    for path in FILES:
        for _, name in imports_of(path):
            users.get(name.split(".")[0], set()).add(name_of(path))
    assert users["ffcv"]
    assert users["ffcv"] <= FFCV_FILES
    assert users["wandb"]
    assert [user for user in users["wandb"] if not user.startswith("harness/tracking/")] == []


def test_the_size_test_sees_what_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "large.py"
    file.write_text("def f():\n" + "    1\n" * MAX_FILE_LINES)
    assert too_large(file) == [
        f"{MAX_FILE_LINES + 1} lines: find the missing room",
        f"f has {MAX_FILE_LINES + 1} lines",
    ]


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import torch\ntorch.load('x')", 1),
        ("from torch import load\nload('x')", 1),
        ("import pickle as p\np.loads(b'')", 1),
        ("import yaml\nyaml.load('x', Loader=yaml.Loader)", 1),
        ("import yaml\nyaml.load('x', yaml.UnsafeLoader)", 1),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", 1),
        ("from pickle import Unpickler\nclass U(Unpickler): pass", 1),
        ("import shelve\nshelve.open('x')", 1),
        ("eval('1')", 1),
        ("import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load('x', Loader=L)\nyaml.safe_load('x')", 0),
        ("import pickletools\nlist(pickletools.genops(b'x'))", 0),
        ("from torchvision.datasets import CIFAR10", 1),
    ],
)
def test_the_loading_test_sees_unsafe_code_alone(tmp_path: Path, code: str, count: int) -> None:
    file = tmp_path / "some.py"
    file.write_text(code + "\n")
    assert len(unsafe_loads(file)) == count


def test_scripts_are_executable_and_stop_at_the_first_error() -> None:
    for path in (ROOT / "launch.sh", ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh")):
        assert os.access(path, os.X_OK), path
        assert path.read_text().startswith("#!/usr/bin/env bash\n"), path
        assert "\nset -euo pipefail\n" in path.read_text(), path
    sandbox = ROOT / "scripts" / "slurm_sandbox"
    assert os.access(sandbox, os.X_OK)
    assert sandbox.read_text().startswith("#!/usr/bin/env python3\n")


def test_what_runs_before_training_does_not_import_torch() -> None:
    """Recipes are checked and remembered splits are read in milliseconds, torch takes a second or more."""
    rooms = ("recipe", "launch.local", "launch.torchrun", "launch.slurm", "sweeps.spec", "sweeps.run")
    code = "import sys\n" + "".join(
        f"import harness.{room}\nif 'torch' in sys.modules: sys.exit('{room} imports torch')\n" for room in rooms
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
