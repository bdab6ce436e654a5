"""A door before a W&B server: it lets one key through, refuses others as W&B does, and keeps what was asked.

openwandb takes any key and forgets the aliases of artifacts and the group of a run, so what the real client sends is
looked at on its way. Everything behind the door is the real server.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.faults.wandb_server import KEY

_OF_THE_CONNECTION = {"transfer-encoding", "connection", "content-length", "keep-alive"}


class Door:
    """A port that hands requests on to another.

    Attributes:
        asked: the variables of each GraphQL request, in order.
        summaries: each summary that was sent, in order; openwandb drops what is nested in them.
        refuses: paths, or parts of them, that are answered with a status of their own.
    """

    def __init__(self, port: int) -> None:
        self.asked: list[dict[str, Any]] = []
        self.summaries: list[dict[str, Any]] = []
        self.refuses: dict[str, int] = {}
        self._to = port
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def values(self, name: str) -> list[Any]:
        """What was sent under a name, wherever it stood in a request's variables."""
        found = [(v.get("input") or v).get(name) for v in self.asked]
        return [value for value in found if value]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        door = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path == "/graphql" and body:
                    door.asked.append(json.loads(body).get("variables") or {})
                if self.path.endswith("/file_stream") and body:
                    content = json.loads(body).get("files", {}).get("wandb-summary.json", {}).get("content", [])
                    door.summaries += map(json.loads, content)
                token = self.headers.get("Authorization", "").removeprefix("Basic ")
                signed = self.command == "PUT"  # an upload's address is its own permission
                if refused := [status for part, status in door.refuses.items() if part in self.path]:
                    self._answer(refused[0], [], b"")
                elif not signed and base64.b64decode(token).decode().partition(":")[2] != KEY:
                    self._answer(401, [], b'{"errors":[{"message":"user is not logged in"}]}')
                else:
                    with closing(http.client.HTTPConnection("127.0.0.1", door._to, timeout=30)) as inner:
                        inner.request(self.command, self.path, body, dict(self.headers))
                        answer = inner.getresponse()
                        status, headers, body = answer.status, answer.getheaders(), answer.read()
                    with suppress(BrokenPipeError):  # nobody waits for it any more
                        self._answer(status, headers, body)

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in _OF_THE_CONNECTION:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None: ...

        return Handler
