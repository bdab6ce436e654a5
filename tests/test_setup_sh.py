"""scripts/setup.sh: what it installs when, and that it is quick when there is nothing to do.

A real installation takes minutes and gigabytes, so pip is a stand-in that notes how it was called; all else is real.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Clone:
    """A copy of what set-up reads, with an environment whose pip only takes notes."""

    folder: Path
    env: dict[str, str]
    calls_seen: int = field(default=0)

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def setup(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "scripts" / "setup.sh"), *arguments]
        return subprocess.run(command, env=self.env | extra, capture_output=True, text=True, timeout=60, check=False)

    def pip_calls(self) -> list[str]:
        """The extras of the calls of pip since the last look ("" for none)."""
        log = self.folder / "pip-calls"
        calls = log.read_text().splitlines() if log.exists() else []
        new, self.calls_seen = calls[self.calls_seen :], len(calls)
        return [call.rpartition(str(self.folder))[2].strip("[]") for call in new]

    def stand_in(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    folder = tmp_path / "a clone"
    (folder / "scripts").mkdir(parents=True)
    (folder / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
  *"-m pip install"*"[ffcv"*) echo "$*" >>{shlex.quote(str(folder))}/pip-calls; exit ${{FFCV_BUILD:-0}} ;;
  *"-m pip install"*) echo "$*" >>{shlex.quote(str(folder))}/pip-calls; echo no network; exit ${{PIP:-0}} ;;
  *"import ffcv"*) exit ${{FFCV_IMPORT:-0}} ;;
esac
exec {shlex.quote(sys.executable)} "$@"
""")
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HARNESS_NO_APT": "1"}
    env.pop("HARNESS_VENV", None)
    made = Clone(folder, env)
    made.stand_in("pkg-config", 'case "$2" in $LACKING) exit 1 ;; esac')
    made.stand_in("g++", "exit 0")
    return made


def test_the_first_time_installs_and_the_second_does_nothing_quickly(clone: Clone) -> None:
    assert clone.setup().returncode == 0
    assert clone.pip_calls() == ["ffcv"]
    assert "ffcv=yes" in (clone.venv / ".harness-setup").read_text()
    start = time.perf_counter()
    again = clone.setup()
    assert time.perf_counter() - start < 3  # an installation takes minutes
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert clone.pip_calls() == []


def test_the_tools_of_developers_are_added_once_and_stay(clone: Clone) -> None:
    clone.setup()
    clone.setup("--dev")
    clone.setup("--dev")
    clone.setup()
    assert clone.pip_calls() == ["ffcv", "ffcv,dev"]
    project = clone.folder / "pyproject.toml"
    project.write_text(project.read_text().replace('"timm>=', '"timm>1,>='))
    clone.setup()
    assert clone.pip_calls() == ["ffcv,dev"]


def test_settings_of_tools_are_no_reason_to_install_again(clone: Clone) -> None:
    clone.setup()
    project = clone.folder / "pyproject.toml"
    project.write_text(project.read_text().replace("timeout = 300", "timeout = 301"))
    clone.setup()
    assert clone.pip_calls() == ["ffcv"]


@pytest.mark.parametrize(
    ("lacking", "packages"),
    [("opencv4", "libopencv-dev"), ("libturbojpeg", "libturbojpeg0-dev"), ("*", "libopencv-dev libturbojpeg0-dev")],
)
def test_without_the_packages_for_ffcv_all_else_is_installed(clone: Clone, lacking: str, packages: str) -> None:
    done = clone.setup(LACKING=lacking)
    assert done.returncode == 0
    assert f"missing Debian packages: {packages})" in done.stderr
    assert f"HINT: apt-get install {packages}" in done.stderr
    assert clone.pip_calls() == [""]
    assert "ffcv=no" in (clone.venv / ".harness-setup").read_text()
    # Nothing new: nothing to do. The packages are there: FFCV is built.
    clone.setup(LACKING=lacking)
    assert clone.pip_calls() == []
    assert clone.setup().returncode == 0
    assert clone.pip_calls() == ["ffcv"]


def test_without_ffcv_developers_still_get_their_tools(clone: Clone) -> None:
    assert clone.setup("--dev", LACKING="*").returncode == 0
    assert clone.pip_calls() == ["dev"]


@pytest.mark.parametrize(
    ("extra", "reason"), [({"FFCV_BUILD": "1"}, "building it failed"), ({"FFCV_IMPORT": "1"}, "cannot be imported")]
)
def test_ffcv_that_does_not_build_or_load_is_left_out(clone: Clone, extra: dict[str, str], reason: str) -> None:
    done = clone.setup(**extra)
    assert done.returncode == 0
    assert reason in done.stderr
    assert clone.pip_calls() == ["ffcv", ""]
    assert "ffcv=no" in (clone.venv / ".harness-setup").read_text()


def test_a_failed_installation_is_told_and_tried_again(clone: Clone) -> None:
    done = clone.setup(FFCV_BUILD="1", PIP="1")
    assert done.returncode == 1
    assert "no network" in done.stderr
    assert "setup.log" in done.stderr
    assert clone.pip_calls() == ["ffcv", ""]
    assert clone.setup().returncode == 0
    assert clone.pip_calls() == ["ffcv"]


def test_no_python_that_fits_is_told(clone: Clone) -> None:
    shutil.rmtree(clone.venv)
    for name in ("python3", "python3.11", "python3.12", "python"):
        clone.stand_in(name, '[ "$1" = --version ] && echo Python 3.9.2 && exit 0; exit 1')
    done = clone.setup()
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12 found; python3 is Python 3.9.2" in done.stderr
    assert "HINT" in done.stderr


@pytest.mark.slow
def test_an_environment_is_made_where_there_is_none(clone: Clone) -> None:
    """With a real Python, whose pip then has nothing to install from: an index that is not there."""
    shutil.rmtree(clone.venv)
    base = Path(sys.base_prefix) / "bin" / "python3"
    done = clone.setup(PYTHON=str(base), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(clone.folder))
    assert done.returncode == 1
    assert "pip could not install the packages" in done.stderr
    assert (clone.venv / "bin" / "pip").exists()
    assert not (clone.venv / ".harness-setup").exists()


def test_an_unknown_option(clone: Clone) -> None:
    done = clone.setup("--all")
    assert done.returncode == 2
    assert "HINT: scripts/setup.sh [--dev]" in done.stderr
