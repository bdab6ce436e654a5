"""The recipes that come with the package, by their names: `harness train quickstart` works from any folder."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

# In a checkout a link to the top level's recipes/; in a wheel the files themselves.
RECIPES = (Path(__file__).parents[1] / "recipes").resolve()


def names() -> list[str]:
    """The names of the packaged recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def is_name(path: Path) -> bool:
    """Whether a path is a bare word, as the names of packaged recipes are."""
    return len(path.parts) == 1 and not path.suffix


def locate(path: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe: `path` from `folder`, or the packaged one of that name where there is no such file."""
    packaged = RECIPES / f"{path}.yaml"
    found = folder / path
    return packaged if is_name(Path(path)) and packaged.is_file() and not found.is_file() else found


def describe(name: str) -> str:
    """The first sentence of a packaged recipe's comment."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return comment.partition(". ")[0].rstrip(".")
