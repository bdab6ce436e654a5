"""Runs as text: the list's figures, order and widths, curves that fit and have no colour codes in pipes, and runs that
still grow."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from harness.cli import main
from harness.errors import HarnessError
from harness.files import LOCK
from harness.recipe import load
from harness.recipe.loading import resolved_yaml
from harness.report.charts import Series
from harness.report.terminal import age, as_json, curves_of, draw, draw_runs, parse_what, render
from harness.runs import list_runs, open_run
from tests.handmade import records_of, write_run

NAMES = [f"20260101-00000{i}-aaaa" for i in range(3)]
SIZE = os.terminal_size((80, 40))
COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")


# --- the list


def test_figures_and_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "small" / "whole", (0.5, 0.7, 0.6), ema=True)
    (write_run(tmp_path / "small" / "broken", settings={"training": {}}) / "result.json").write_text("{")
    whole, broken = (as_json(run) for run in sorted(list_runs(tmp_path), key=lambda run: run.is_broken))
    assert (whole["best_accuracy"], whole["best_ema_accuracy"]) == (0.7, pytest.approx(0.71))
    assert (whole["epoch"], whole["epochs"], whole["recipe"], whole["state"]) == (3, 2, "small", "finished")
    assert (broken["state"], broken["problems"]) == ("broken", ["result.json is broken"])
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "finished    3/2  70.00%  71.00%" in out
    assert "broken      2/?  60.00%       -" in out
    assert "\n    result.json is broken\n" in out
    assert "2 runs (1 finished, 1 broken), newest last" in out


def test_the_newest_is_last_and_ages_are_of_the_latest_record(tmp_path: Path) -> None:
    for name, start in zip(NAMES, (3e5, 1e5, 2e5), strict=True):
        write_run(tmp_path / "small" / name, (0.5,), start_unix_seconds=start)
    runs = list_runs(tmp_path)
    assert [run.path.name for run in runs] == [NAMES[1], NAMES[2], NAMES[0]]
    lines = render(runs, tmp_path, width=None, now_unix_seconds=3e5 + 60 + 300).splitlines()
    assert "5 min" in lines[3]
    assert "27 h" in lines[2]
    ages = {-3: "0 s", 99: "99 s", 100: "1 min", 5999: "99 min", 6000: "1 h", 172_799: "47 h", 172_800: "2 d"}
    assert [age(seconds) for seconds in ages] == list(ages.values())


def test_lines_fit_a_terminal_and_run_ids_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs", "quickstart", NAMES[0]), ema=True)
    write_run(Path("runs", "a" * 60, NAMES[1]), ema=True)
    write_run(Path("runs", "other", NAMES[2]), settings={"name": "b" * 90})
    runs = list_runs()
    text = render(runs, Path("runs"), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in NAMES)
    assert "a" * 60 in render(runs, Path("runs"), width=None)
    plain = render([run for run in runs if run.recipe_name == "quickstart"], Path("runs"), width=80)
    assert f"runs/quickstart/{NAMES[0]}" in plain
    assert "RECIPE" not in plain


def test_only_runs_of_a_recipe_and_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("small", "large"):
        write_run(tmp_path / name / "a")
    assert main(["runs", str(tmp_path), "--recipe", "large", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["order"], [run["recipe"] for run in found["runs"]]) == ("newest last", ["large"])
    assert main(["runs", str(tmp_path), "--recipe", "lrge"]) == 2
    assert 'Did you mean "large"?' in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs below runs\n"


def test_hundreds_of_runs_in_under_two_seconds_without_torch(tmp_path: Path) -> None:
    first = write_run(tmp_path / "small" / "run-0", [i / 60 for i in range(50)], ema=True)
    recipe = resolved_yaml(load(Path(__file__).parents[2] / "recipes" / "seed.yaml"))
    steps = (first / "metrics.jsonl").read_text() + 500 * (first / "metrics.jsonl").read_text().splitlines(True)[0]
    for i in range(300):
        run = tmp_path / "small" / f"run-{i}"
        run.mkdir(exist_ok=True)
        for name, text in (("recipe.yaml", recipe), ("provenance.json", "{}"), ("metrics.jsonl", steps)):
            (run / name).write_text(text)
    code = (
        "import sys\nfrom harness.cli import main\n"
        f"code = main(['runs', {str(tmp_path)!r}])\n"
        "sys.exit('torch is imported' if 'torch' in sys.modules else code)"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "300 runs" in done.stdout
    # Other processes may keep it waiting, so the clock would tell of them.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


# --- curves


def straight(name: str, values: list[float]) -> Series:
    return Series(name, [i + 1.0 for i in range(len(values))], values)


def test_a_curve_that_rises_goes_from_the_lower_left_to_the_upper_right() -> None:
    text = draw("accuracy", [straight("test", [0.0, 0.5, 1.0])], size=SIZE, colours=False, as_percent=True)
    title, *rows = text.splitlines()
    assert title == "accuracy by epoch"
    drawn = [row for row in rows if "│" in row or "┤" in row]
    assert len(drawn) == 14
    assert drawn[0].endswith("a")
    assert "100%" in drawn[0]
    assert drawn[-1].split("┤")[1][0] != " "
    assert drawn[-1].split("┤")[0].strip() == "0%"
    starts = [len(row) - len(row[7:].lstrip(" ")) for row in drawn]
    assert starts == sorted(starts, reverse=True)
    assert rows[-1] == "  a test: 100.00% at epoch 3"


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
@pytest.mark.parametrize(
    "values",
    [[0.5], [0.5, 0.5], [1e-7, 2e-7], [-3.0, 1e6], [float(i) for i in range(300)],
     [-1e308, 1e308], [1e308, 1e308], [5e-324, 0.0], [1e-300, 1e300], [0.0, 0.0]],
)  # fmt: skip
def test_no_line_is_wider_than_the_terminal(columns: int, values: list[float]) -> None:
    """Also at the ends of what floats hold."""
    size = os.terminal_size((columns, 24))
    curves = [straight("a-run-with-a-long-name test", values), straight("b", values[::-1])]
    text = draw("loss", curves, size=size, colours=False)
    lines = text.splitlines()
    assert len(lines) == 19
    assert max(map(len, lines if columns >= 40 else lines[:-2])) <= max(columns, 26)
    assert any({*line.split("│")[-1].split("┤")[-1]} & {*"ab"} for line in lines[1:15])
    # plotille sees that there is no terminal; see below for one.
    assert not COLOUR_CODE.search(draw("loss", curves, size=size, colours=True))


@pytest.mark.parametrize(("count", "colours"), [(9, True), (30, False)])
def test_many_curves_are_told_apart(count: int, colours: bool) -> None:
    curves = [straight(f"run {i}", [float(i), float(i)]) for i in range(count)]
    marks = [line.split("run")[0] for line in draw("loss", curves, size=SIZE, colours=colours).splitlines()[-count:]]
    rows = draw("loss", curves[:2], size=SIZE, colours=False).splitlines()
    assert (set("ab") & set(rows[1]), set("ab") & set(rows[14])) == ({"b"}, {"a"})  # each letter on its curve
    assert len(set(marks)) == count
    assert all(re.search(r"[a-zA-Z]", COLOUR_CODE.sub("", mark)) for mark in marks)


def test_train_test_and_averaged_weights_of_several_runs(tmp_path: Path) -> None:
    runs = [open_run(write_run(tmp_path / "small" / f"run-{i}", (0.3, 0.4, 0.5), ema=i == 0)) for i in range(2)]
    assert {curve.name for curve in curves_of(runs[:1], "loss")} == {"train", "test", "EMA"}
    both = [curve.name for curve in curves_of(runs, "accuracy")]
    assert both == ["run-0 train", "run-0 test", "run-0 EMA", "run-1 train", "run-1 test"]
    assert [curve.name for curve in curves_of(runs, "throughput")] == ["run-0", "run-1"]
    assert curves_of(runs[:1], "lr")[0].y == pytest.approx([0.1, 0.05, 0.1 / 3])


def test_a_run_shows_what_there_is_and_what_is_broken(tmp_path: Path) -> None:
    broken = write_run(tmp_path / "small" / "broken")
    (broken / "recipe.yaml").write_text("[")
    text, _ = draw_runs([broken], ("accuracy",), size=SIZE, colours=False)
    assert "recipe.yaml is broken" in text
    assert "test: 60.00% at epoch 2" in text
    run = write_run(tmp_path / "small" / "run", (), finished=False)
    text, is_going = draw_runs([run], ("loss",), size=SIZE, colours=False)
    assert "no values yet" in text
    assert "empty" in text
    assert not is_going
    (run / "metrics.jsonl").write_text(json.dumps(records_of((0.3,))[0]) + '\n{"kind": "st')
    with FileLock(run / LOCK):
        text, is_going = draw_runs([run], ("loss",), size=SIZE, colours=False)
    assert is_going
    assert "train: 1.7 at epoch 0.5" in text
    assert "running" in text


def test_piped_it_is_plain_text_in_any_encoding(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small" / "run", settings={"name": "café"})
    command = [sys.executable, "-m", "harness", "curves", str(run), "--what", "loss,accuracy,lr,throughput"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert all(f"{title} by epoch" in done.stdout for title in ("loss", "accuracy", "learning rate"))
    for name in ("curves", "runs", "compare"):
        done = subprocess.run([sys.executable, "-m", "harness", name, str(run)], capture_output=True, timeout=60,
                              check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"caf?" in done.stdout or name == "runs"


def on_a_terminal(
    arguments: list[str], *, columns: int, until: str = "", then: signal.Signals | None = None, **env: str
) -> tuple[int, str]:
    """Run a command on a terminal of its own and return its code and what it wrote; end it when it wrote `until`."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments], stdin=terminal, stdout=terminal, stderr=terminal,
        env=environment | {"TERM": "xterm-256color"} | env,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit none
    )  # fmt: skip
    os.close(terminal)
    written, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([controller], [], [], 0.2)[0]:
            try:
                written += os.read(controller, 65536)
            except OSError:  # nobody writes there any more
                break
        if then is not None and until in written.decode(errors="replace"):
            process.send_signal(then)
            then = None
    try:
        code = process.wait(timeout=30)
    finally:
        process.kill()
        os.close(controller)
    return code, written.decode(errors="replace")


def test_on_a_terminal_it_has_colours_and_its_width(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small" / "run")
    code, text = on_a_terminal(["curves", str(run)], columns=50)
    assert code == 0
    assert COLOUR_CODE.search(text)
    assert max(len(COLOUR_CODE.sub("", line)) for line in text.split("\r\n")) in range(40, 51)
    code, text = on_a_terminal(["curves", str(run)], columns=50, NO_COLOR="1")
    assert code == 0
    assert not COLOUR_CODE.search(text)


def test_watching_ends_with_the_run_and_draws_what_comes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small" / "run", (0.3,), finished=False)
    command = [sys.executable, "-u", "-m", "harness", "curves", str(run), "--what", "accuracy", "--watch"]
    with FileLock(run / LOCK):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "test: 30.00% at epoch 1" in line:
                break
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records_of((0.3, 0.8))[3:])
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "test: 80.00% at epoch 2" in rest


def test_watching_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small" / "run", (0.3,), finished=False)
    command = ["curves", str(run), "--what", "loss", "--watch"]
    with FileLock(run / LOCK):
        code, text = on_a_terminal(command, columns=60, until="at epoch 1", then=signal.SIGINT)
    assert code == 0
    assert "Traceback" not in text
    assert text.count("\x1b[H\x1b[2J") == 1  # drawn again only when there is something new


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "small" / "run")
    assert main(["curves", str(run), "--what", "losss"]) == 2
    assert 'Did you mean "loss"?' in capsys.readouterr().err
    assert main(["curves", str(tmp_path / "nowhere")]) == 2
    assert "there is no such run" in capsys.readouterr().err
    with pytest.raises(HarnessError, match="names nothing"):
        parse_what(" , ")
    assert parse_what("lr,loss,lr") == ["lr", "loss"]
