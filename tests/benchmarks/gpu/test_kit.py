"""The kit for an offline machine: what is packed comes out to the bit, and what is broken on the way is named."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from harness.benchmarks.gpu import kit_needs, kit_parts
from harness.benchmarks.gpu.kit_unpack import KitError, main, unpack
from harness.data.prepare import open_store, prepare
from harness.data.sources import locate
from harness.errors import HarnessError
from tests.conftest import ROOT
from tests.data.test_parquet import rows, write

LIMIT_BYTES = 1_000_000


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real digits, converted, as the group "data", and two small files as "wheels"."""
    store = prepare("digits").directory
    folder = tmp_path_factory.mktemp("packed")
    (folder / "wheels").mkdir()
    for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl"):
        (folder / "wheels" / name).write_bytes(os.urandom(1000))
    (folder / "wheels" / "empty-1-py3-none-any.whl").touch()
    data = [(path, f"data/{store.name}/{path.name}") for path in sorted(store.iterdir())]
    groups = {"wheels": kit_parts.wheels_of(folder / "wheels"), "data": data}
    kit_parts.pack(groups, folder / "kit", part_limit_bytes=LIMIT_BYTES)
    return folder


@pytest.fixture
def kit(packed: Path, tmp_path: Path) -> Path:
    """A copy of the kit, to break."""
    return shutil.copytree(packed / "kit", tmp_path / "kit")


def part_names(kit: Path, group: str) -> list[str]:
    return [part["name"] for part in json.loads((kit / "kit.json").read_text())["groups"][group]["parts"]]


def test_everything_comes_out_as_it_went_in(packed: Path, kit: Path, tmp_path: Path) -> None:
    """By the script in the kit, in a Python that sees nothing else."""
    sizes = [path.stat().st_size for path in kit.glob("*.part")]
    assert len(part_names(kit, "data")) > 3
    assert max(sizes) <= LIMIT_BYTES
    place = tmp_path / "place"
    command = [sys.executable, "-I", str(kit / "unpack.py"), str(place)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    store = prepare("digits").directory
    for wheel in (packed / "wheels").iterdir():
        assert (place / "wheels" / wheel.name).read_bytes() == wheel.read_bytes()
    for file in store.iterdir():
        assert (place / "data" / store.name / file.name).read_bytes() == file.read_bytes()
    assert open_store(place / "data" / store.name).split("train").count == 1438
    assert [path for path in place.rglob(".*") if path.is_file()] == []


def test_a_group_comes_out_without_the_parts_of_another(kit: Path, tmp_path: Path) -> None:
    for name in part_names(kit, "data"):
        (kit / name).unlink()
    assert len(unpack(kit, tmp_path / "place", ["wheels"])) == 3
    with pytest.raises(KitError, match='no group "wheel"\n  HINT: Its groups: wheels, data'):
        unpack(kit, tmp_path / "place", ["wheel"])


def test_every_broken_part_is_named_and_nothing_is_written(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, short, absent, whole = part_names(kit, "data")[:4]
    content = bytearray((kit / changed).read_bytes())
    content[12345] ^= 1
    (kit / changed).write_bytes(content)
    os.truncate(kit / short, 99)
    (kit / absent).unlink()
    assert main([str(tmp_path / "place"), "--kit", str(kit)]) == 2
    said = capsys.readouterr().err
    assert f"{changed}: damaged, its SHA-256 is not that of kit.json" in said
    assert f"{short}: has 99 bytes instead of " in said
    assert f"{absent}: is missing" in said
    assert "HINT: Carry these parts again." in said
    assert whole not in said
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is broken"),
        ("[]", "is broken"),
        ('{"format": 2}', "has format 2"),
        ('{"format": 1, "groups": {"a": {"parts": [], "files": [{"path": "../x"}]}}}', "outside the destination: ../x"),
        ('{"format": 1, "groups": {"a": {"parts": [], "files": [{"path": "/x"}]}}}', "outside the destination: /x"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_index_is_refused(kit: Path, tmp_path: Path, text: str | None, problem: str) -> None:
    if text is None:
        (kit / "kit.json").unlink()
    else:
        (kit / "kit.json").write_text(text)
    with pytest.raises(KitError, match=problem):
        unpack(kit, tmp_path / "place")


def test_a_file_that_does_not_fit_the_index_does_not_appear(kit: Path, tmp_path: Path) -> None:
    index = json.loads((kit / "kit.json").read_text())
    index["groups"]["wheels"]["files"][0]["sha256"] = "0" * 64
    (kit / "kit.json").write_text(json.dumps(index))
    with pytest.raises(KitError, match="does not come out as it was packed"):
        unpack(kit, tmp_path / "place", ["wheels"])
    assert [path for path in (tmp_path / "place").rglob("*") if path.is_file()] == []


def test_packing_again_replaces_a_kit_but_no_other_folder(kit: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "c-1-py3-none-any.whl"
    wheel.write_bytes(b"x" * 10)
    kit_parts.pack({"wheels": [(wheel, "wheels/c.whl")]}, kit, part_limit_bytes=4)
    assert sorted(path.name for path in kit.glob("*.part")) == [f"wheels-{n}-of-3.part" for n in (1, 2, 3)]
    (kit / "thesis.tex").write_text("years of work")
    with pytest.raises(HarnessError, match=r"holds something else: thesis\.tex"):
        kit_parts.pack({"wheels": [(wheel, "wheels/c.whl")]}, kit, part_limit_bytes=4)
    assert (kit / "thesis.tex").exists()
    with pytest.raises(HarnessError, match="there is nothing to pack"):
        kit_parts.pack({"wheels": []}, tmp_path / "other", part_limit_bytes=4)


def test_cifar10_is_found_again_where_it_comes_out(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "here" / "cifar10" / "plain_text", train=[rows(30), rows(20)], test=[rows(10)])
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "here"))
    before = locate("cifar10", download=False).files
    kit = tmp_path / "kit"
    assert kit_parts.main([str(kit), "--python", "3.12", "--data", "cifar10", "--part-mb", "0.002"]) == 0
    text = (kit / "README.txt").read_text()
    assert "at most 0.002 MB" in text
    assert all(name in text for name in part_names(kit, "data"))
    assert main([str(tmp_path / "place"), "--kit", str(kit)]) == 0
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "place" / "data"))
    after = locate("cifar10", download=False).files
    assert [path.name for path in after] == [path.name for path in before]
    assert [path.read_bytes() for path in after] == [path.read_bytes() for path in before]


def test_without_data_packing_says_so(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path))
    assert kit_parts.main([str(tmp_path / "kit"), "--python", "3.12", "--data", "cifar10"]) == 2
    assert "HINT" in capsys.readouterr().err
    assert not (tmp_path / "kit").exists()


# --- what the other machine lacks


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_requirements_are_the_projects_without_what_is_there_or_built() -> None:
    found = kit_needs.requirements(project())
    assert {"accelerate>=1.10,<2", "pydantic>=2.10,<3", "numba>=0.61", "pytest>=8.3"} <= set(found)
    names = {text.split(">")[0] for text in found}
    assert not names & {"torch", "torchvision", "ffcv", "wandb", "mypy", "openwandb"}


def test_what_is_taken_for_granted_is_the_oldest_that_the_project_allows() -> None:
    asked = project()["project"]["dependencies"]
    for name, version in kit_needs.ALWAYS_THERE.items():
        assert any(text.startswith(f"{name}>={version.removesuffix('.0')},") for text in asked)


def test_packages_of_the_other_machine_are_read(tmp_path: Path) -> None:
    there = kit_needs.read_there("# pip 24\nNumPy==2.5.2\n\nopencv.python_headless==5.0.0.93\ntorch==2.11.0+cu130\n")
    assert there["numpy"] == "2.5.2"
    assert there["torch"] == "2.11.0+cu130"
    assert there["opencv-python"] == "5.0.0.93"  # the same module, so ffcv has what it needs
    assert kit_needs.read_there("opencv-python==4.1")["opencv-python-headless"] == "4.1"
    assert "opencv-python" in kit_needs.read_there("")
    assert "opencv-python-headless" not in kit_needs.read_there("")
    assert there["torchvision"] == kit_needs.ALWAYS_THERE["torchvision"]
    with pytest.raises(HarnessError, match='line 2 is not NAME==VERSION: "torch @ file:///x"'):
        kit_needs.read_there("numpy==2.5.2\ntorch @ file:///x\n")
    kit_needs.write_stand_ins(there, tmp_path)
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=[str(tmp_path)])}
    assert found == there


@pytest.mark.slow
def test_pip_takes_stand_ins_for_packages(tmp_path: Path) -> None:
    """The real pip, with nothing to fetch from: what is there is not wanted, what is too old is."""
    there = tmp_path / "there.txt"
    there.write_text("numpy==2.5.2\npyyaml==5.1\n")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], timeout=120, check=True)
    python = tmp_path / "env" / "bin" / "python"
    needs = [python, "-m", "harness.benchmarks.gpu.kit_needs", "stand-ins", "--there", there]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    subprocess.run(needs, env=env, timeout=60, check=True)
    pip = [python, "-m", "pip", "install", "--dry-run", "numpy>=2,<3", "torch>=2.9,<3"]
    assert subprocess.run(pip, env=env, capture_output=True, timeout=60, check=False).returncode == 0
    done = subprocess.run([*pip, "pyyaml>=6,<7"], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "pyyaml" in done.stderr


def test_what_pip_would_install_is_named_but_for_what_is_left_out() -> None:
    packages = [("pydantic", "2.14.4"), ("ffcv", "1.0.2"), ("Annotated_Types", "0.8.0"), ("wandb", "1")]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in packages]}
    assert kit_needs.missing(report) == ["Annotated_Types==0.8.0", "pydantic==2.14.4"]
