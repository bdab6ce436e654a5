"""`harness report --serve`: a run's page on the loopback interface, kept up to date while the run goes on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

from harness.errors import HarnessError
from harness.files import write_text
from harness.reporting.report import Reporter

HOST = "127.0.0.1"
LOOK_SECONDS = 2.0


class Server(ThreadingHTTPServer):
    """Shows one page; `show` replaces it."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.page, self.version = b"", ""
        self._begun, self._count = time.time_ns(), 0
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise HarnessError(
                f"port {port} cannot be used ({error.strerror})",
                where=HOST,
                hint="Give another --port, or none: a free one is taken.",
            ) from None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def show(self, page: str, version: str) -> None:
        self.page, self.version = page.encode(), version

    def next_version(self) -> str:
        """One that no page has, nor had of a server that was at this port before."""
        self._count += 1
        return f"{self._begun}-{self._count}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a browser that went away


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:  # the name that http.server calls
        # A page of elsewhere whose name was made to lead here has that name as its host.
        if self.headers.get("Host", "").split(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path in ("/", "/report.html"):
            self._send(self.server.page, "text/html; charset=utf-8")
        elif self.path == "/version":
            self._send(self.server.version.encode(), "text/plain; charset=utf-8")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(reporter: Reporter, output: Path, *, port: int = 0, look_seconds: float = LOOK_SECONDS) -> None:
    """Show a run's page until Ctrl-C or SIGTERM, and write it to a file whenever it has changed.

    Curves are made anew when the run's records have grown, and what needs a checkpoint when there is a new one.

    Args:
        reporter: of the run.
        output: the file.
        port: to listen on; 0 takes a free one.
        look_seconds: between two looks at the run.

    Raises:
        HarnessError: the port is taken, or the file cannot be written.
    """
    with Server(port) as server, _ended_by_signals() as ended:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="report server")
        reporter.update_run()
        version = server.next_version()
        server.show(reporter.html(version=version), version)
        thread.start()
        try:
            print(f"{server.url}  (Ctrl-C ends it)", flush=True)
            changed = True
            while True:
                changed = reporter.update_checkpoint() or changed
                if changed:
                    version = server.next_version()
                    server.show(reporter.html(version=version), version)
                    write_text(output, reporter.html())
                if ended.wait(look_seconds):
                    break
                changed = reporter.update_run()
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _ended_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, even where the shell that started us told us to ignore them."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if ended.is_set():  # a second Ctrl-C, while a long part is made
            raise KeyboardInterrupt
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
