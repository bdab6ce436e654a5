"""Where data and caches lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.files import cache_directory, data_directories, writable_cache_directory


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_cache_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    with pytest.raises(HarnessError, match="permission denied"):
        writable_cache_directory()
