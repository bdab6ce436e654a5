"""Errors that a user can cause: how they read, and that each says what to do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from harness.errors import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    Diverged,
    HarnessError,
    ManyErrors,
    nearest,
    print_error,
)
from tests.test_house import FILES, calls_of, module_of, name_of, tree_of

RAISED = {"harness.errors.HarnessError", "harness.errors.Diverged"}
# Calls that need no hint of their own, by function.
WITHOUT_HINT = {
    "recipe.loading._read_with_bases": "puts the place of `base:` before an error that has its hint in its text",
}


def function_around(tree: ast.Module, line: int) -> str:
    """The dotted name of the innermost function or class around a line, empty outside of all."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    around = [n for n in ast.walk(tree) if isinstance(n, kinds) and n.lineno <= line <= (n.end_lineno or 0)]
    return ".".join(n.name for n in sorted(around, key=lambda n: n.lineno))


def says_what_to_do(call: ast.Call) -> bool:
    """Whether a call has a hint that is not empty, or is marked as a failure of ours, which no user can mend."""
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    hint, code = words.get("hint"), words.get("exit_code")
    internal = isinstance(code, ast.Constant) and code.value == 1
    return internal or (hint is not None and not (isinstance(hint, ast.Constant) and not hint.value))


def without_hint(path: Path, module: str) -> dict[str, list[int]]:
    """Lines of the errors made without a hint, by the dotted name of the function around them."""
    found: dict[str, list[int]] = {}
    tree = tree_of(path)
    for call, name in calls_of(path):
        if name in RAISED and not says_what_to_do(call):
            found.setdefault(f"{module}.{function_around(tree, call.lineno)}", []).append(call.lineno)
    return found


def test_every_error_says_what_to_do() -> None:
    offenders = [
        f"{name_of(path)}:{line} in {function}"
        for path in FILES
        for function, lines in without_hint(path, module_of(path)).items()
        for line in lines
        if function not in WITHOUT_HINT
    ]
    assert not offenders, "errors without `hint=`:\n" + "\n".join(offenders)


def test_no_exception_outlives_its_reason() -> None:
    found = {function for path in FILES for function in without_hint(path, module_of(path))}
    assert set(WITHOUT_HINT) - found == set(), "these have hints now: take them off WITHOUT_HINT"


def small_hints(path: Path) -> list[str]:
    """Hints that begin with a small letter, as far as they stand in the source; commands and keys do so rightly."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Assign):
            names = [ast.unparse(target) for target in node.targets]
        else:
            continue
        text = node.value.values[0] if isinstance(node.value, ast.JoinedStr) and node.value.values else node.value
        if any(name.lower().endswith("hint") for name in names) and isinstance(text, ast.Constant):
            word = str(text.value).partition(" ")[0]
            if word.isalpha() and word[0].islower() and word not in ("harness", "pip", "ls", "sbatch"):
                found.append(f"{name_of(path)}:{node.value.lineno}: {text.value}")
    return found


def test_hints_are_sentences() -> None:
    offenders = [hint for path in FILES for hint in small_hints(path)]
    assert not offenders, "hints that begin with a small letter:\n" + "\n".join(offenders)


def test_the_hint_test_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        "from harness.errors import Diverged, HarnessError as Wrong\n"
        "import harness.errors\n"
        "class A:\n"
        "    def f(self):\n"
        "        raise Wrong('a')\n"
        "def g():\n"
        "    yield Diverged('b', where='c')\n"
        "    yield harness.errors.HarnessError('d', hint='')\n"
        "    yield Wrong('e', hint=None)\n"
        "    yield Wrong('f', exit_code=2)\n"
        "def fine(e):\n"
        "    yield Wrong('a', hint='b')\n"
        "    yield Wrong('a', hint=e.hint)\n"
        "    yield Wrong('a', exit_code=1)\n"
        "    yield ValueError('a')\n"
    )
    assert without_hint(file, "m") == {"m.A.f": [5], "m.g": [7, 8, 9, 10]}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (HarnessError("it is wrong"), "it is wrong"),
        (HarnessError("it is wrong", where="a.yaml:3"), "a.yaml:3: it is wrong"),
        (HarnessError("it is wrong", hint="mend it"), "it is wrong\n  HINT: mend it"),
        (HarnessError("it is wrong", where="a.yaml:3", hint="mend it"), "a.yaml:3: it is wrong\n  HINT: mend it"),
    ],
)
def test_an_error_reads_where_what_hint(error: HarnessError, text: str) -> None:
    assert error.render() == text
    assert str(error) == text
    assert error.exit_code == EXIT_BAD_INPUT


def test_divergence_has_its_own_exit_code() -> None:
    error = Diverged("the loss is nan", where="step 4", hint="lower optimizer.lr")
    assert str(error) == "step 4: the loss is nan\n  HINT: lower optimizer.lr"
    assert error.exit_code == EXIT_DIVERGED
    assert isinstance(error, HarnessError)


def test_many_errors_are_told_together() -> None:
    first = HarnessError("unknown key", where="a.yaml:3", hint='Did you mean "epochs"?')
    many = ManyErrors("a.yaml", [first, HarnessError("must be > 0", where="a.yaml:5")])
    assert str(many) == (
        "a.yaml: 2 errors\n"
        "  a.yaml:3: unknown key\n"
        '    HINT: Did you mean "epochs"?\n'
        "  a.yaml:5: must be > 0"
    )  # fmt: skip
    assert many.errors[0] is first
    assert many.exit_code == EXIT_BAD_INPUT
    assert str(ManyErrors("a.yaml", [first])).startswith("a.yaml: 1 error\n")
    assert ManyErrors("run", [first, Diverged("nan")]).exit_code == EXIT_DIVERGED


@pytest.mark.parametrize(
    ("name", "valid", "text"),
    [
        ("epcohs", ["epochs", "seed"], 'Did you mean "epochs"?'),
        ("rl", ["lr", "momentum"], 'Did you mean "lr"?'),
        ("xyz", ["b", "a", "a"], "Valid names: a, b."),
        ("xyz", [], "There are no valid names here."),
        ("qq", [f"n{i:02}" for i in range(12)], "Valid names: " + ", ".join(f"n{i:02}" for i in range(12)) + "."),
        (
            "qq",
            [f"n{i:02}" for i in range(13)],
            "Valid names begin with: " + ", ".join(f"n{i:02}" for i in range(12)) + ", …",
        ),
    ],
)
def test_the_nearest_name(name: str, valid: list[str], text: str) -> None:
    assert nearest(name, valid) == text


def test_how_many_names_are_shown_can_be_chosen() -> None:
    assert nearest("qq", ["a", "b", "c"], show_all_up_to=2) == "Valid names begin with: a, b, …"


@pytest.mark.parametrize(
    ("rank", "text"),
    [
        (None, "ERROR a.yaml: it is wrong\n  HINT: mend it\n"),
        ("0", "ERROR a.yaml: it is wrong\n  HINT: mend it\n"),
        ("3", "ERROR (rank 3) a.yaml: it is wrong\n"),
    ],
)
def test_rank_0_says_all_and_the_others_one_line(
    rank: str | None, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    print_error(HarnessError("it is wrong", where="a.yaml", hint="mend it"))
    assert capsys.readouterr() == ("", text)
