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
from pathlib import Path

import pytest

from tests.conftest import ROOT

PYTHON = """#!/bin/sh
case "$*" in
  *"-m pip install"*"[ffcv"*) echo "$*" >>{folder}/pip-calls; exit ${{FFCV_BUILD:-0}} ;;
  *"-m pip install"*) echo "$*" >>{folder}/pip-calls; echo no network; exit ${{PIP:-0}} ;;
  *"import ffcv"*) exit ${{FFCV_IMPORT:-0}} ;;
esac
exec {python} "$@"
"""


class Clone:
    """A copy of what set-up reads, with an environment whose pip only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv, self.project = folder, folder / ".venv", folder / "pyproject.toml"
        self.env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HARNESS_NO_APT": "1"}
        self.env.pop("HARNESS_VENV", None)
        for part in ("scripts", "bin", ".venv/bin"):
            (folder / part).mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", folder)
        quoted = {"folder": shlex.quote(str(folder)), "python": shlex.quote(sys.executable)}
        self.stand_in(".venv/bin/python", PYTHON.format(**quoted))
        self.stand_in("bin/pkg-config", '#!/bin/sh\ncase "$2" in $LACKING) exit 1 ;; esac\n')
        self.stand_in("bin/g++", "#!/bin/sh\n")

    def stand_in(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def setup(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / "scripts" / "setup.sh"), *arguments]
        return subprocess.run(command, env=self.env | extra, capture_output=True, text=True, timeout=60, check=False)

    def pip_calls(self) -> list[str]:
        """The extras of the calls of pip since the last look ("" for none)."""
        log = self.folder / "pip-calls"
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [call.rpartition(str(self.folder))[2].strip("[]") for call in calls]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "a clone")


def test_the_first_time_installs_and_the_second_does_nothing_quickly(clone: Clone) -> None:
    assert clone.setup().returncode == 0
    assert clone.pip_calls() == ["ffcv"]
    assert "ffcv=yes" in (clone.venv / ".harness-setup").read_text()
    start = time.perf_counter()
    again = clone.setup()
    assert time.perf_counter() - start < 3  # an installation takes minutes
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    clone.project.write_text(clone.project.read_text().replace("timeout = 300", "timeout = 301"))
    clone.setup()  # settings of tools are no reason to install again
    assert clone.pip_calls() == []


def test_the_tools_of_developers_are_added_once_and_stay(clone: Clone) -> None:
    for arguments in ((), ("--dev",), ("--dev",), ()):
        clone.setup(*arguments)
    assert clone.pip_calls() == ["ffcv", "ffcv,dev"]
    clone.project.write_text(clone.project.read_text().replace('"timm>=', '"timm>1,>='))
    clone.setup()
    assert clone.pip_calls() == ["ffcv,dev"]


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
        clone.stand_in(f"bin/{name}", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0; exit 1\n')
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
