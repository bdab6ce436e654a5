"""`harness report`: a run as one HTML file, whatever state it is in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from harness.errors import HarnessError
from harness.files import write_text
from harness.report.evidence import Evidence, NoCheckpoint
from harness.report.explain import gallery_body, grad_cam_body
from harness.report.network import architecture_body, fields_body, layers_body
from harness.report.page import Section, check_target, missing, page
from harness.report.predictions import BINS, calibration_body, class_body, confusion_body
from harness.report.sections import curves_section, origin_section, rates_section, summary_section
from harness.runs import CHECKPOINTS, METRICS, RESULT, is_held, open_run
from harness.training import checkpoint

FILE = "report.html"
NO_CHECKPOINT = "There is no checkpoint yet."

# What needs a checkpoint: anchor, title, lead, what makes it.
_CHECKPOINT_SECTIONS: tuple[tuple[str, str, str, Callable[[Evidence], Markup]], ...] = (
    ("confusion", "Confusion matrix", "Which test images are taken for what: the fuller the colour, the larger the "
     "share of the true class.", confusion_body),
    ("classes", "Accuracy by class", "Accuracy of a class: the share of its test images that are classified rightly "
     "(recall). Precision: the share of the images taken for it that are of it.", class_body),
    ("calibration", "Calibration", "Whether the network's probabilities can be believed. The expected calibration "
     f"error is the mean gap between probability and accuracy over {BINS} bins of equal width, weighted by their "
     "images (Guo et al. 2017).", calibration_body),
    ("mistakes", "Worst mistakes", "The misclassified test images whose true class got the lowest probability.",
     gallery_body),
    ("grad-cam", "Where it looks", "Grad-CAM (Selvaraju et al. 2017) of the predicted class, in float32: where in the "
     "image the features of a layer speak for it.", grad_cam_body),
    ("fields", "Receptive fields", "How much of an image one central unit at the end of each branch depends on, to "
     "scale around a test image; what lies outside of the image is padding.", fields_body),
    ("architecture", "Architecture", "The network from its settings, features as channels × height × width.",
     architecture_body),
    ("layers", "Layers", "", layers_body),
)  # fmt: skip


class Reporter:
    """Makes a run's page, and again only those parts of it that have changed.

    Args:
        path: a run directory or one of its checkpoints.
        which: "last", "best" or "step_N".
        weights: "raw" or "ema".
        output: the file; None is `report.html` in the run directory. Only another report is written over.

    Raises:
        HarnessError: no run, a checkpoint or weights that were asked for by name and are not there, or a file that
            cannot be written.
    """

    def __init__(self, path: Path, *, which: str = "last", weights: str = "raw", output: Path | None = None) -> None:
        if (path / checkpoint.MANIFEST).is_file():
            which = path.name
        self.run, self.which, self.weights = open_run(path), which, weights
        self.file = output or self.run.path / FILE
        self.problems: list[str] = []  # what of the checkpoint could not be shown, in sentences
        self._run_stamp: object = None  # what was read so far was for its path and state alone
        self._checkpoint_stamp: object = None
        self._run_sections: list[Section] = []
        self._checkpoint_sections = [
            Section(id, title, missing("Being made …"), lead) for id, title, lead, _ in _CHECKPOINT_SECTIONS
        ]
        self._as_of = ""
        self._notes: list[str] = []
        evidence = self._evidence()
        if which not in ("last", "best"):
            evidence.path()
        if weights == "ema" and self._checkpoints() and evidence.saved().ema is None:
            raise HarnessError("the run has no averaged weights", where=str(self.run.path), hint="Use --weights raw.")
        check_target(self.file)

    def update_run(self) -> bool:
        """Read the run again if it has grown, and make its curves; whether anything has changed."""
        names = (METRICS, RESULT, "recipe.yaml", "provenance.json")
        # Taken before it is read: what is written meanwhile is read the next time.
        stamp = [_changed_at(self.run.path / name) for name in names], is_held(self.run.path)
        if stamp == self._run_stamp:
            return False
        self._run_stamp, self._as_of = stamp, _now()
        self.run = run = open_run(self.run.path)
        self._run_sections = [summary_section(run), curves_section(run), rates_section(run), origin_section(run)]
        return True

    def update_checkpoint(self) -> bool:
        """Make what needs a checkpoint if there is a new one; whether there was."""
        stamp = [(path.name, _changed_at(path / checkpoint.MANIFEST)) for path in self._checkpoints()]
        if stamp == self._checkpoint_stamp:
            return False
        self._checkpoint_stamp, self._as_of = stamp, _now()
        evidence = self._evidence()
        problems: dict[str, list[str]] = {}  # reason -> sections
        made = []
        for id, title, lead, body in _CHECKPOINT_SECTIONS:
            try:
                made.append(Section(id, title, body(evidence), lead))
            except NoCheckpoint:
                problems.setdefault(NO_CHECKPOINT, []).append(title)
            except (HarnessError, OSError) as error:
                reason = _reason(error)
                problems.setdefault(reason, []).append(title)
                made.append(Section(id, title, missing(reason), lead))
        if waiting := problems.get(NO_CHECKPOINT):
            words = f"{NO_CHECKPOINT} With the first one come: {', '.join(waiting)}."
            made.insert(0, Section("checkpoint", "What the network does", missing(words)))
        self._checkpoint_sections = made
        self.problems = [f"{', '.join(titles)}: {reason}" for reason, titles in problems.items()]
        self._notes = _notes(evidence)
        return True

    def html(self, *, version: str | None = None) -> str:
        """The page as it is now; `version` as `harness.report.page.page` takes it."""
        *first, last = self._run_sections
        state = "stopped before its end" if self.run.state == "stopped" else self.run.state
        return page(
            self.run.label,
            [*first, *self._checkpoint_sections, last],
            subtitle=f"A training run of {self.run.recipe_name}, as it was at {self._as_of}.",
            badges=[state, *self._notes],
            notes=[f"{problem}." for problem in self.run.problems],
            version=version,
        )

    def write(self) -> list[str]:
        """Write the whole report; returns, in sentences, what it could not show."""
        self.update_run()
        self.update_checkpoint()
        write_text(self.file, self.html())
        return [*self.run.problems, *self.problems]

    def _evidence(self) -> Evidence:
        # Nothing but the report is written into a run that trains.
        return Evidence(self.run, which=self.which, weights=self.weights, keep=self.run.state != "running")

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


def _notes(evidence: Evidence) -> list[str]:
    """Which checkpoint it is, and whether on its own images."""
    found = ["no checkpoint yet"]
    with suppress(HarnessError, OSError):  # the sections say so
        found = [f"{evidence.path().name}, {'averaged' if evidence.weights == 'ema' else 'raw'} weights"]
        if not evidence.has_its_images():
            found.append("test images other than those of the training")
    return found


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _changed_at(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
