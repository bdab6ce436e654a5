"""Nothing secret is written, files have the user's umask. What is read and could run: tests/faults/rows_malice.py."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.cli import main
from tests.conftest import ROOT

SECRETS = {
    "WANDB_API_KEY": "5ec4e7" * 7,
    "HF_TOKEN": "hf_canary_of_the_hub",
    "AWS_SECRET_ACCESS_KEY": "canary/of/a/cloud",
    "GITHUB_TOKEN": "ghp_canary_of_a_forge",
}


def test_secrets_are_written_nowhere_and_files_have_the_umask(tiny: Path, tmp_path: Path) -> None:
    """With W&B on (offline): its client has the key too."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    command = [sys.executable, "-m", "harness", "train", str(tiny), "tracking.wandb=offline", "--run-dir", str(run)]
    environment = os.environ | SECRETS | {"HARNESS_CACHE": str(cache), "WANDB_MODE": "offline"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False, umask=0o027
    )
    assert done.returncode == 0, done.stderr
    assert list(run.glob("wandb/offline-run-*"))
    files = [path for folder in (run, cache) for path in folder.rglob("*") if path.is_file()]
    written = {str(path): path.read_bytes() for path in files} | {"output": (done.stdout + done.stderr).encode()}
    found = [
        (name, path) for name, secret in SECRETS.items() for path, text in written.items() if secret.encode() in text
    ]
    assert found == []
    own = [path for path in files if "wandb" not in path.relative_to(path.anchor).parts]
    assert {stat.S_IMODE(path.stat().st_mode) for path in own if not path.name.endswith(".lock")} == {0o640}


def test_a_parquet_row_cannot_name_a_file_to_read(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"private")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "test"):
        rows = [{"bytes": None, "path": str(secret)}, {"bytes": None, "path": "../secret.png"}]
        table = pa.table({"img": pa.array(rows, image), "label": pa.array([0, 1], pa.int64())})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    assert main(["train", str(tiny), "data.source=parquet", f"data.path={tmp_path}"]) == 2
    assert "row 0" in capsys.readouterr().err
