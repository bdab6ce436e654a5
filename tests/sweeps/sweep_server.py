"""A W&B server with sweeps: openwandb, which has none, with a small one in front that answers what agents ask.

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
OF_A_CONNECTION = ("content-length", "transfer-encoding", "connection", "date", "server", "host", "accept-encoding")


class SweepServer(ThreadingHTTPServer):
    """Gives an agent one point after another, then tells it to end.

    Args:
        behind: the port of the server for everything else.
        points: of parameters by their dotted keys.
    """

    daemon_threads = True

    def __init__(self, behind: int, points: Sequence[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.behind, self.points = int(self.server_address[1]), behind, list(points)
        self.configuration: dict[str, Any] = {}
        self.run_ids: list[str] = []

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
            commands = [] if json.loads(variables["runState"]) else [self._next()]
            return {"agentHeartbeat": {"agent": {"id": "4"}, "commands": json.dumps(commands)}}
        return None

    def _next(self) -> dict[str, Any]:
        number = len(self.run_ids)
        if number == len(self.points):
            return {"type": "exit"}
        self.run_ids.append(f"run{number:05d}")
        arguments = {key: {"value": value} for key, value in self.points[number].items()}
        return {"type": "run", "run_id": self.run_ids[-1], "program": None, "args": arguments}


class _Handler(BaseHTTPRequestHandler):
    server: SweepServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with contextlib.suppress(ValueError):
            request = json.loads(body) if self.path.endswith("/graphql") else {"query": ""}
            found = self.server.answer(request["query"], request.get("variables") or {})
            if found is not None:
                return self._send(200, [("Content-Type", "application/json")], json.dumps({"data": found}).encode())
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)) as behind:
            behind.request(self.command, self.path, body=body, headers=dict(_kept(self.headers.items())))
            answer = behind.getresponse()
            return self._send(answer.status, answer.getheaders(), answer.read())

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - the names that http.server calls

    def _send(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in [*_kept(headers), ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        """Say nothing."""


def _kept(headers: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in OF_A_CONNECTION]


@contextlib.contextmanager
def sweep_server(behind: int, points: Sequence[dict[str, Any]]) -> Iterator[SweepServer]:
    server = SweepServer(behind, points)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
