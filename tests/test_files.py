"""Where data and caches lie, and files that are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.files import cache_directory, data_directories, find_input, writable_cache_directory


def test_data_folders_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.setenv("HARNESS_DATA", os.pathsep.join([str(tmp_path), "", str(tmp_path / "b")]))
    assert data_directories() == [tmp_path, tmp_path / "b"]
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "none"))
    with pytest.raises(HarnessError, match=r"\$HARNESS_DATA names a folder that is not there: .*none"):
        data_directories()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HARNESS_CACHE", "~/c")
    assert cache_directory("x", "y") == tmp_path / "c" / "x" / "y"
    monkeypatch.delenv("HARNESS_CACHE")
    assert cache_directory() == tmp_path / ".cache" / "harness"
    assert not cache_directory().exists()
    assert writable_cache_directory("z").is_dir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(HarnessError, match="the cache folder cannot be written to") as caught:
        writable_cache_directory("z")
    assert "HARNESS_CACHE" in str(caught.value.hint)


def test_a_path_is_expanded_and_looked_for_in_the_data_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HARNESS_DATA", str(tmp_path)), ("HOME", str(tmp_path)), ("PLACE", "mine")):
        monkeypatch.setenv(name, value)
    (tmp_path / "mine").mkdir()
    assert find_input("mine") == find_input("~/$PLACE") == (tmp_path / "mine").resolve()
    for path, words in (
        ("nowhere", f"^nowhere: there is no such file or folder .*{tmp_path}/nowhere"),
        ("/nowhere/at/all", r"^/nowhere/at/all: there is no such file or folder\n"),
        ("$NOWHERE/x", r"\$NOWHERE is not set"),
        ("~nobody_here/x", "no user nobody_here"),
    ):
        with pytest.raises(HarnessError, match=words):
            find_input(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_cache_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    with pytest.raises(HarnessError, match="permission denied"):
        writable_cache_directory()


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    script = (
        "import pathlib, resource, sys\n"
        "from harness.errors import HarnessError\n"
        "from harness.files import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # the system stops the write half-way
        "try: write_text(pathlib.Path(sys.argv[1]), 'x' * 1_000_000)\n"
        "except HarnessError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{path}: cannot be written" in output
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
