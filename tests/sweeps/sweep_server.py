"""A W&B server with sweeps: openwandb, which has none, behind a small one that answers what agents ask.

The client, its agent and all that concerns runs are real; the four operations on sweeps are answered here, and the
points are those that a test gives.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

SWEEP_ID = "swp12345"


class SweepServer(ThreadingHTTPServer):
    """Gives an agent one point after another, then tells it to end.

    Args:
        behind: the port of the server for everything else.
        points: of parameters by their dotted keys.
    """

    daemon_threads = True

    def __init__(self, behind: int, points: Sequence[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.points = behind, list(points)
        self.configuration: dict[str, Any] | None = None
        self.given: list[str] = []
        self.ended: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data of an operation on sweeps; None for any other one."""
        if "UpsertSweep" in query:
            self.configuration = yaml.safe_load(variables["config"])
            project = {"id": "1", "name": variables["projectName"], "entity": {"id": "2", "name": "local"}}
            return {"upsertSweep": {"sweep": {"name": SWEEP_ID, "project": project}, "configValidationWarnings": []}}
        if "SweepWithRuns" in query:
            config = yaml.safe_dump(self.configuration)
            return {"project": {"sweep": {"id": "3", "name": SWEEP_ID, "config": config, "runs": {"edges": []}}}}
        if "CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "4"}}}
        if "agentHeartbeat" in query:
            running = json.loads(variables["runState"])
            return {"agentHeartbeat": {"agent": {"id": "4"}, "commands": json.dumps(self._commands(running))}}
        return None

    def _commands(self, running: dict[str, Any]) -> list[dict[str, Any]]:
        if running:
            return []
        if len(self.given) == len(self.points):
            return [{"type": "exit"}]
        point = self.points[len(self.given)]
        self.given.append(f"run{len(self.given):05d}")
        arguments = {key: {"value": value} for key, value in point.items()}
        return [{"type": "run", "run_id": self.given[-1], "program": None, "args": arguments}]


class _Handler(BaseHTTPRequestHandler):
    server: SweepServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = None
        if self.path.endswith("/graphql"):
            with contextlib.suppress(ValueError):
                request = json.loads(body)
                found = self.server.answer(request["query"], request.get("variables") or {})
        if found is None:
            self._hand_on(body)
        else:
            self._send(200, {"Content-Type": "application/json"}, json.dumps({"data": found}).encode())

    def do_GET(self) -> None:
        self._hand_on(b"")

    def do_PUT(self) -> None:
        self._hand_on(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _hand_on(self, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "accept-encoding")}
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            self._send(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def sweep_server(behind: int, points: Sequence[dict[str, Any]]) -> Iterator[SweepServer]:
    """A server that is gone behind the block."""
    server = SweepServer(behind, points)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
