"""`harness report --serve`: a run's page on the loopback interface, kept up to date while the run trains."""

from __future__ import annotations

import signal
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from harness.errors import HarnessError
from harness.files import write_text
from harness.report.reporter import Reporter

HOST = "127.0.0.1"
LOOK_SECONDS = 2.0


def serve(reporter: Reporter, *, port: int = 0) -> None:
    """Show a run's page until Ctrl-C or SIGTERM, and write it to its file whenever it has changed.

    Curves are made again when the run's records have grown, and what needs a checkpoint when there is a new one.

    Args:
        port: to listen on; 0 takes a free one.

    Raises:
        HarnessError: the port is taken, or the file cannot be written.
    """
    with Server(port) as server:
        # Also where the shell that started us has told us to ignore Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="report server")
        reporter.update_run()
        server.show(reporter)
        thread.start()
        try:
            print(f"{server.url}  (Ctrl-C ends it)", flush=True)
            changed = True
            while True:
                if reporter.update_checkpoint() or changed:
                    server.show(reporter)
                    write_text(reporter.file, reporter.html())
                time.sleep(LOOK_SECONDS)
                changed = reporter.update_run()
        except KeyboardInterrupt:
            pass
        finally:
            server.shutdown()
            thread.join()


class Server(ThreadingHTTPServer):
    """Shows one page; `show` replaces it."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.page, self.version = b"", ""
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

    def show(self, reporter: Reporter) -> None:
        version = str(time.time_ns())  # that no page has, nor had of a server that was at this port before
        self.page, self.version = reporter.html(version=version).encode(), version

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
