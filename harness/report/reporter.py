"""`harness report`: a run as one HTML file, whatever state it is in; with `--serve` kept up to date on the loopback
interface while the run trains."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from markupsafe import Markup

from harness.errors import HarnessError
from harness.files import write_text
from harness.report import explain, sections
from harness.report.lazy_checkpoint import LazyCheckpoint, NoCheckpoint
from harness.report.page import Section, check_target, missing, page
from harness.runs import CHECKPOINTS, METRICS, RESULT, RUN_FILES, is_held, open_run
from harness.training import checkpoint
from harness.training.resume import find_checkpoint

FILE = "report.html"
NO_CHECKPOINT = "There is no checkpoint yet."
HOST = "127.0.0.1"
LOOK_SECONDS = 2.0

# What needs a checkpoint: anchor, title, what makes it.
_CHECKPOINT_SECTIONS: tuple[tuple[str, str, Callable[[LazyCheckpoint], Markup]], ...] = (
    ("confusion", "Confusion matrix", explain.confusion_body),
    ("classes", "Accuracy by class", explain.class_body),
    ("calibration", "Calibration", explain.calibration_body),
    ("mistakes", "Worst mistakes", explain.gallery_body),
    ("grad-cam", "Where it looks", explain.grad_cam_body),
    ("fields", "Receptive fields", sections.fields_body),
    ("architecture", "Architecture", sections.architecture_body),
    ("layers", "Layers", sections.layers_body),
)


class Reporter:
    """Makes the page of a run (or of the run of a checkpoint), and again only those parts of it that have changed.

    It goes to `output`, by default `report.html` in the run directory.

    Raises:
        HarnessError: no run, a checkpoint or weights that were asked for by name and are not there, or a file that
            cannot be written, or is there and no report.
    """

    def __init__(self, path: Path, *, which: str = "last", weights: str = "raw", output: Path | None = None) -> None:
        if (path / checkpoint.MANIFEST).is_file():
            which = path.name
        self.run, self.which, self.weights = open_run(path), which, weights
        self.file = output or self.run.path / FILE
        self._run_stamp: object = None  # what was read so far was for its path and state alone
        self._run_sections: list[Section] = []
        self._checkpoint_stamp: object = None
        self._checkpoint_sections = [
            Section(id, title, missing("Being made …")) for id, title, _ in _CHECKPOINT_SECTIONS
        ]
        self._problems: list[str] = []  # what of the checkpoint could not be shown, in sentences
        self._badges: list[str] = []
        self._as_of = ""
        if which not in ("last", "best"):
            find_checkpoint(self.run.path, which)
        if weights == "ema" and self._checkpoints():
            self._open_checkpoint().tensors()
        check_target(self.file)

    def update_run(self) -> bool:
        """Read the run again if it has grown, and make its curves; whether anything has changed."""
        # Taken before it is read: what is written meanwhile is read the next time.
        stamp = [_changed_at(self.run.path / name) for name in (METRICS, RESULT, *RUN_FILES)], is_held(self.run.path)
        if stamp == self._run_stamp:
            return False
        self._run_stamp, self._as_of = stamp, _now()
        self.run = open_run(self.run.path)
        self._run_sections = [make(self.run) for make in sections.OF_RUN]
        return True

    def update_checkpoint(self) -> bool:
        """Make what needs a checkpoint if there is a new one; whether there was."""
        stamp = [(path.name, _changed_at(path / checkpoint.MANIFEST)) for path in self._checkpoints()]
        if stamp == self._checkpoint_stamp:
            return False
        self._checkpoint_stamp, self._as_of = stamp, _now()
        opened = self._open_checkpoint()
        problems: dict[str, list[str]] = {}  # reason -> sections
        made = []
        for id, title, body in _CHECKPOINT_SECTIONS:
            try:
                made.append(Section(id, title, body(opened)))
            except (HarnessError, OSError) as error:
                reason = NO_CHECKPOINT if isinstance(error, NoCheckpoint) else _reason(error)
                problems.setdefault(reason, []).append(title)
                if reason != NO_CHECKPOINT:
                    made.append(Section(id, title, missing(reason)))
        if waiting := problems.get(NO_CHECKPOINT):
            words = f"{NO_CHECKPOINT} With the first one come: {', '.join(waiting)}."
            made.insert(0, Section("checkpoint", "What the network does", missing(words)))
        self._checkpoint_sections = made
        self._problems = [f"{', '.join(titles)}: {reason}" for reason, titles in problems.items()]
        self._badges = ["no checkpoint yet"]
        with suppress(HarnessError, OSError):  # the sections say so
            self._badges = [f"{opened.path.name}, {'averaged' if self.weights == 'ema' else 'raw'} weights"]
            if not opened.has_its_images:
                self._badges.append("test images other than those of the training")
        return True

    def html(self, *, version: str | None = None) -> str:
        """The page as it is now; `version` as `harness.report.page.page` takes it."""
        *first, last = self._run_sections
        state = "stopped before its end" if self.run.state == "stopped" else self.run.state
        return page(
            self.run.label,
            [*first, *self._checkpoint_sections, last],
            subtitle=f"A training run of {self.run.recipe_name}, as it was at {self._as_of}.",
            badges=[state, *self._badges],
            notes=[f"{problem}." for problem in self.run.problems],
            version=version,
            template="report.html",
            bins=explain.BINS,
        )

    def write(self) -> list[str]:
        """Write the whole report; returns, in sentences, what it could not show."""
        self.update_run()
        self.update_checkpoint()
        write_text(self.file, self.html())
        return [*self.run.problems, *self._problems]

    def _open_checkpoint(self) -> LazyCheckpoint:
        # Nothing but the report is written into a run that trains.
        keep = self.run.state != "running"
        return LazyCheckpoint(self.run, which=self.which, weights=self.weights, keep=keep)

    def _checkpoints(self) -> list[Path]:
        return checkpoint.list_checkpoints(self.run.path / CHECKPOINTS)


def _reason(error: HarnessError | OSError) -> str:
    """Why a section cannot be shown, in a sentence or two."""
    if isinstance(error, OSError):
        gone = f"{error.filename} is gone or cannot be read ({error.strerror})"
        return f"This cannot be shown: {gone}. Make the report again."
    where = f" ({error.where})" if error.where else ""
    words = f"This cannot be shown: {error.what}{where}." + (f" {error.hint}" if error.hint else "")
    return " ".join(words.replace("HINT:", "").split())


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _changed_at(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


# --- serving it


def serve(reporter: Reporter, *, port: int = 0) -> None:
    """Show a run's page at a port (0: a free one) until Ctrl-C or SIGTERM, and write it to its file whenever it has
    changed.

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
            print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
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
            what = f"port {port} cannot be used ({error.strerror})"
            hint = "Give another --port, or none: a free one is taken."
            raise HarnessError(what, where=HOST, hint=hint) from None

    def show(self, reporter: Reporter) -> None:
        version = str(time.time_ns())  # that no page has, nor had of a server that was at this port before
        self.page, self.version = reporter.html(version=version).encode(), version

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a browser went away."""


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
        """Say nothing."""
