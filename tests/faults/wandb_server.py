"""A server that speaks W&B's protocol (openwandb, of the dev extra), and a slow way to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from harness.launch.rank_env import free_port
from tests.faults.runs import ROOT, NotHere

KEY = "local" + "0" * 40
START_SECONDS = 60.0


class WandbServer:
    """`openwandb serve` on the loopback, in a folder. Raises NotHere where it is not installed."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log = folder, log
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        words = [_program(), "serve", "--host", "127.0.0.1", "--port", str(self.port), "--data-dir", str(self._folder)]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self._log.parent)
        deadline = time.monotonic() + START_SECONDS
        while not listens(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise NotHere(f"openwandb does not start: {self._log.read_text()[-300:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The rows it has of a run, in its order; times of W&B's own left out."""
        files = list(self._folder.glob(f"files/*/*/{run_id}/wandb-history.jsonl"))
        lines = files[0].read_text().splitlines() if files else []
        return [{k: v for k, v in json.loads(line).items() if k != "_runtime"} for line in lines if line]

    def runs(self) -> dict[str, dict[str, Any]]:
        """Its table of runs, by id: display_name, state, tags, config, summary."""
        with contextlib.closing(sqlite3.connect(self._folder / "openwandb.db")) as database:
            rows = database.execute(
                "SELECT run_id, display_name, state, tags_json, config_json, summary_json FROM runs"
            )
            return {
                run_id: {
                    "name": name,
                    "state": state,
                    "tags": json.loads(tags),
                    "config": json.loads(config),
                    "summary": json.loads(summary),
                }
                for run_id, name, state, tags, config, summary in rows
            }

    def artifacts(self, run_id: str) -> list[tuple[str, str, dict[str, Any]]]:
        """(name, type, metadata) of a run's artifacts, in order."""
        with contextlib.closing(sqlite3.connect(self._folder / "openwandb.db")) as database:
            query = "SELECT name, artifact_type, metadata_json FROM artifacts WHERE run_id = ? ORDER BY id"
            return [(name, kind, json.loads(facts)) for name, kind, facts in database.execute(query, (run_id,))]

    def files(self, run_id: str) -> dict[str, Path]:
        """The files that it has of a run, by their names."""
        folders = list(self._folder.glob(f"files/*/*/{run_id}"))
        return {str(p.relative_to(folders[0])): p for p in folders[0].rglob("*") if p.is_file()} if folders else {}

    def holds(self) -> int:
        """Bytes in its folder."""
        return sum(p.stat().st_size for p in self._folder.rglob("*") if p.is_file())


def environment(port: int, *, key: str = KEY) -> dict[str, str]:
    """What a training needs to send to a server on this port."""
    return {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": key, "WANDB_MODE": "online"}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _program() -> str:
    beside = Path(sys.executable).parent
    found = os.environ.get("HARNESS_OPENWANDB") or shutil.which("openwandb", path=f"{beside}:{os.environ['PATH']}")
    if found is None:
        raise NotHere(f"needs openwandb: pip install openwandb, or scripts/setup.sh --dev in {ROOT.name}")
    return found


class SlowWay:
    """A port that hands everything on to another, each piece after `seconds`."""

    def __init__(self, port: int, seconds: float) -> None:
        self._to, self._seconds = port, seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        for each in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                thread = threading.Thread(target=self._hand_on, args=(source, target), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _hand_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while piece := source.recv(1 << 16):
                time.sleep(self._seconds)
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return
