"""`harness report`: a run as one HTML file, whatever state it is in."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from harness.errors import HarnessError
from harness.files import write_text
from harness.reporting.calibration import BINS
from harness.reporting.evidence import Evidence, NoCheckpoint
from harness.reporting.page import Section, check_target, missing, page
from harness.reporting.sections_network import architecture_body, fields_body, grad_cam_body, layers_body
from harness.reporting.sections_run import curves_section, origin_section, rates_section, summary_section
from harness.reporting.sections_test import calibration_body, class_body, confusion_body, gallery_body
from harness.run_directory import CHECKPOINTS
from harness.runs import RESULT, Run, is_held, open_run
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
    """Makes a run's page, and makes anew only what has changed.

    Args:
        path: a run directory or one of its checkpoints.
        which: "last", "best" or "step_N".
        weights: "raw" or "ema".

    Raises:
        HarnessError: no run, or a checkpoint or weights that were asked for by name and are not there.
    """

    def __init__(self, path: Path, *, which: str = "last", weights: str = "raw") -> None:
        if (path / checkpoint.MANIFEST).is_file():
            which = path.name
        self.run, self.which, self.weights = open_run(path), which, weights
        self._run_stamp: object = None  # what was read so far was for its path and state alone
        self._checkpoint_stamp: object = None
        self._run_sections: list[Section] = []
        self._checkpoint_sections = [Section(id, title, missing("Being made …"), lead)
                                     for id, title, lead, _ in _CHECKPOINT_SECTIONS]  # fmt: skip
        self._as_of = ""
        self._notes: tuple[str, ...] = ()
        self.problems: list[str] = []
        self._check_what_was_asked_for()

    def update_run(self) -> bool:
        """Read the run anew if it has grown, and make its curves; whether anything has changed."""
        stamp = self._stamp()
        if stamp != self._run_stamp:
            self.run, self._run_stamp = open_run(self.run.path), stamp
            self._as_of = _now()
        else:
            return False
        run = self.run
        self._run_sections = [summary_section(run), curves_section(run), rates_section(run), origin_section(run)]
        return True

    def update_checkpoint(self) -> bool:
        """Make what needs a checkpoint if there is a new one; whether there was."""
        stamp = [(p.name, _changed_at(p / checkpoint.MANIFEST)) for p in _checkpoints(self.run)]
        if stamp == self._checkpoint_stamp:
            return False
        self._checkpoint_stamp, self._as_of = stamp, _now()
        evidence = self._evidence()
        problems: dict[str, list[str]] = {}  # reason -> sections
        made = []
        for id, title, lead, body in _CHECKPOINT_SECTIONS:
            try:
                made.append(Section(id, title, body(evidence), lead))
            except HarnessError as error:
                reason = _reason(error)
                problems.setdefault(reason, []).append(title)
                if not isinstance(error, NoCheckpoint):
                    made.append(Section(id, title, missing(reason), lead))
        if waiting := problems.get(NO_CHECKPOINT):
            told = f"{NO_CHECKPOINT} With the first one come: {', '.join(waiting)}."
            made.insert(0, Section("checkpoint", "What the network does", missing(told)))
        self._checkpoint_sections = made
        self.problems = [f"{', '.join(titles)}: {reason}" for reason, titles in problems.items()]
        self._notes = tuple(_notes(evidence))
        return True

    def html(self, *, version: str | None = None) -> str:
        """The page as it is now; `version` as `harness.reporting.page.page` takes it."""
        *first, last = self._run_sections
        state = {"running": "running", "finished": "finished", "stopped": "stopped before its end", "empty": "empty"}
        return page(
            self.run.label,
            [*first, *self._checkpoint_sections, last],
            subtitle=f"A training run of {self.run.recipe_name}, as it was at {self._as_of}.",
            badges=[state[self.run.state], *self._notes],
            notes=[f"{problem}." for problem in self.run.problems],
            version=version,
        )

    def _evidence(self) -> Evidence:
        # Nothing but the report is written into a run that trains.
        return Evidence(self.run, which=self.which, weights=self.weights, keep=self.run.state != "running")

    def _check_what_was_asked_for(self) -> None:
        evidence = self._evidence()
        if self.which not in ("last", "best"):
            evidence.path()
        if self.weights == "ema" and _checkpoints(self.run) and evidence.saved().ema is None:
            raise HarnessError("the run has no averaged weights", where=str(self.run.path), hint="Use --weights raw.")

    def _stamp(self) -> object:
        names = ("metrics.jsonl", RESULT, "recipe.yaml", "provenance.json")
        return [_changed_at(self.run.path / name) for name in names], is_held(self.run.path)


def write_report(
    path: Path, *, which: str = "last", weights: str = "raw", output: Path | None = None
) -> tuple[Path, list[str]]:
    """Write a run's report; returns its path and, in sentences, what it could not show.

    Args:
        path, which, weights: as `Reporter` takes them.
        output: the file; None is `report.html` in the run directory. Only another report is written over.

    Raises:
        HarnessError: as `Reporter`, or the file cannot be written.
    """
    reporter = Reporter(path, which=which, weights=weights)
    file = output_of(reporter, output)
    reporter.update_run()
    reporter.update_checkpoint()
    write_text(file, reporter.html())
    return file, [*reporter.run.problems, *reporter.problems]


def output_of(reporter: Reporter, output: Path | None) -> Path:
    """The file that a report goes to.

    Raises:
        HarnessError: there is something else already, or its folder cannot be written to.
    """
    file = output or reporter.run.path / FILE
    check_target(file)
    return file


def _reason(error: HarnessError) -> str:
    """Why a section cannot be shown, in a sentence or two."""
    if isinstance(error, NoCheckpoint):
        return NO_CHECKPOINT
    where = f" ({error.where})" if error.where else ""
    told = f"This cannot be shown: {error.what}{where}." + (f" {error.hint}" if error.hint else "")
    return " ".join(told.replace("HINT:", "").split())


def _notes(evidence: Evidence) -> list[str]:
    try:
        found = [f"{evidence.path().name}, {'averaged' if evidence.weights == 'ema' else 'raw'} weights"]
    except HarnessError:
        return ["no checkpoint yet"]
    try:
        if not evidence.has_its_images():
            found.append("test images other than those of the training")
    except HarnessError:
        pass  # the sections say so
    return found


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _checkpoints(run: Run) -> list[Path]:
    return checkpoint.list_checkpoints(run.path / CHECKPOINTS)


def _changed_at(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
