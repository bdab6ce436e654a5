"""Errors that a user can cause: how they read, and that each says what to do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from harness.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, Diverged, HarnessError, ManyErrors, nearest, print_error
from tests.test_house import FILES, calls_of, module_of, name_of, tree_of

RAISED = {"harness.errors.HarnessError", "harness.errors.Diverged"}
# Calls that need no hint of their own, by function.
WITHOUT_HINT = {
    "training.evaluate.Evaluator.score": "a failure of ours, which no user can fix",
    "recipe.loading._read_with_bases": "puts the place of `base:` before an error that has its hint in its text",
}


def function_around(tree: ast.Module, line: int) -> str:
    """The dotted name of the innermost function or class around a line, empty outside of all."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    around = [n for n in ast.walk(tree) if isinstance(n, kinds) and n.lineno <= line <= (n.end_lineno or 0)]
    return ".".join(n.name for n in sorted(around, key=lambda n: n.lineno))


def says_what_to_do(call: ast.Call) -> bool:
    """Whether a call has a hint that is not empty, or is marked as a failure of ours, which no user can fix."""
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    hint, code = words.get("hint"), words.get("exit_code")
    internal = isinstance(code, ast.Constant) and code.value == 1
    return internal or (hint is not None and not (isinstance(hint, ast.Constant) and not hint.value))


def without_hint(path: Path, module: str) -> list[tuple[int, str]]:
    """The errors made without a hint: line, and dotted name of the function around it."""
    wrong = [call.lineno for call, name in calls_of(path) if name in RAISED and not says_what_to_do(call)]
    return [(line, f"{module}.{function_around(tree_of(path), line)}") for line in wrong]


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


def test_every_error_says_what_to_do_in_a_sentence() -> None:
    found = [(name_of(path), *error) for path in FILES for error in without_hint(path, module_of(path))]
    assert [error for error in found if error[2] not in WITHOUT_HINT] == [], "errors without `hint=`"
    gone = set(WITHOUT_HINT) - {function for _, _, function in found}
    assert gone == set(), "these have hints now: take them off WITHOUT_HINT"
    assert [hint for path in FILES for hint in small_hints(path)] == [], "hints that begin with a small letter"


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
    assert sorted(without_hint(file, "m")) == [(5, "m.A.f"), *((line, "m.g") for line in (7, 8, 9, 10))]


def test_an_error_reads_where_what_hint() -> None:
    assert str(HarnessError("it is wrong")) == "it is wrong"
    error = HarnessError("it is wrong", where="a.yaml:3", hint="Fix it.")
    assert (str(error), error.exit_code) == ("a.yaml:3: it is wrong\n  HINT: Fix it.", EXIT_BAD_INPUT)
    diverged = Diverged("the loss is nan", where="step 4", hint="Lower optimizer.lr.")
    assert str(diverged) == "step 4: the loss is nan\n  HINT: Lower optimizer.lr."
    assert diverged.exit_code == EXIT_DIVERGED


def test_many_errors_are_reported_together() -> None:
    first = HarnessError("unknown key", where="a.yaml:3", hint='Did you mean "epochs"?')
    many = ManyErrors("a.yaml", [first, HarnessError("must be > 0", where="a.yaml:5")])
    assert str(many) == (
        "a.yaml: 2 errors\n"
        "  a.yaml:3: unknown key\n"
        '    HINT: Did you mean "epochs"?\n'
        "  a.yaml:5: must be > 0"
    )  # fmt: skip
    assert (many.errors[0], many.exit_code) == (first, EXIT_BAD_INPUT)
    assert str(ManyErrors("a.yaml", [first])).startswith("a.yaml: 1 error\n")
    assert ManyErrors("run", [first, Diverged("nan")]).exit_code == EXIT_DIVERGED


MANY = [f"n{i:02}" for i in range(13)]


@pytest.mark.parametrize(
    ("name", "valid", "text"),
    [
        ("epcohs", ["epochs", "seed"], 'Did you mean "epochs"?'),
        ("epo\u0441hs", ["epochs"], 'Did you mean "epochs"? The given name has U+0441 CYRILLIC SMALL LETTER ES.'),
        ("rl", ["lr", "momentum"], 'Did you mean "lr"?'),
        ("xyz", ["b", "a", "a"], "Valid names: a, b."),
        ("xyz", [], "There are no valid names here."),
        ("qq", MANY[:12], f"Valid names: {', '.join(MANY[:12])}."),
        ("qq", MANY, f"Valid names begin with: {', '.join(MANY[:12])}, …"),
    ],
)
def test_the_nearest_name(name: str, valid: list[str], text: str) -> None:
    assert nearest(name, valid) == text


def test_rank_0_says_all_and_the_others_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    whole = "ERROR a.yaml: it is wrong\n  HINT: Fix it.\n"
    for rank, text in ((None, whole), ("0", whole), ("3", "ERROR (rank 3) a.yaml: it is wrong\n")):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        print_error(HarnessError("it is wrong", where="a.yaml", hint="Fix it."))
        assert capsys.readouterr() == ("", text)
