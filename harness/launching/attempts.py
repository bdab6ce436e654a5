"""The command of a training when it is tried again: it goes on with the run of the attempt before, and no other."""

from __future__ import annotations

from pathlib import Path

from harness.errors import HarnessError
from harness.recipe import load
from harness.runs import has_checkpoints, new_run_directory, run_of


def with_run_directory(words: list[str]) -> list[str]:
    """The command with a run directory that a later attempt finds again; unchanged where `--resume auto` finds it.

    Args:
        words: a command that ends with `train RECIPE …`.
    """
    if "train" not in words or value_of(words, "--run-dir") is not None:
        return words
    resume = value_of(words, "--resume")
    if resume == "auto":
        return words
    run = run_of(Path(resume)) if resume not in (None, "never") else None
    if run is None:
        arguments = words[words.index("train") + 1 :]
        try:
            recipe = load(arguments[0], [word for word in arguments[1:] if "=" in word and not word.startswith("-")])
        except (HarnessError, IndexError):
            return words  # the training will say what is wrong with it
        run = new_run_directory(recipe.name)
    return [*words, "--run-dir", str(run)]


def next_attempt(words: list[str]) -> list[str] | None:
    """The command for another attempt, or None where it could not go on with the same run.

    That is so for a run that was to go on from a checkpoint of another one and has written none of its own yet.
    """
    resume, run = value_of(words, "--resume"), value_of(words, "--run-dir")
    if resume not in (None, "never", "auto") and (run is None or not has_checkpoints(Path(run))):
        return None
    return [*_without(words, "--resume"), "--resume", "auto"]


def value_of(words: list[str], option: str) -> str | None:
    """The value of an option, given as two words or as `--option=value`; the last one counts."""
    found = None
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            found = words[index + 1]
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def _without(words: list[str], option: str) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option and not skip
    return kept
