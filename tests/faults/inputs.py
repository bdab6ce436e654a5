"""Bad inputs by the thousand: recipes, overrides, manifests, headers. Each kind makes examples and tries them.

What is asked of every example: an error of ours or a result, in its time; nothing is run, nothing is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from harness.data.prepare import read_manifest
from harness.errors import HarnessError
from harness.recipe import Recipe, load
from harness.recipe.loading import fingerprint, resolved_yaml
from tests.faults.examples import NASTY, SCALARS, VALUES, bombs, changes, edits, paths_of
from tests.faults.runs import ROOT

LIMIT_SECONDS = 10.0  # a hundred times what the slowest takes on a quiet machine
CANARY = "canary"
DEBUG = ROOT / "recipes" / "debug.yaml"
Try = Callable[[Any], None]


@dataclass(frozen=True)
class Kind:
    """A kind of input: what it is, how examples are made, and (given a folder of its own) how one is tried."""

    title: str
    examples: st.SearchStrategy[Any]
    prepare: Callable[[Path], Try]
    share: float  # of all inputs


def run_kind(kind: Kind, count: int, folder: Path, *, random_seed: int = 0) -> tuple[int, str | None]:
    """Try `count` examples; how many were tried, and the smallest one that was not answered well, which ends it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    attempt = kind.prepare(folder)
    before = _contents(folder)
    tried = 0

    @seed(random_seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.examples)
    def each(example: Any) -> None:
        nonlocal tried
        tried += 1
        with limited(LIMIT_SECONDS):
            attempt(example)

    try:
        each()
    except Exception as error:  # whatever an example gave: it is the finding
        text = f"{type(error).__name__}: {error}; {'; '.join(getattr(error, '__notes__', []))}"
        return tried, text[:1000]
    if [*folder.rglob(f"*{CANARY}*"), *Path.cwd().glob(CANARY)]:
        return tried, "an input ran code"
    return tried, None if _contents(folder) == before else "an input changed files"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise inside the block when it takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest's own time limit uses the same timer
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, before)


def _contents(folder: Path) -> dict[str, str]:
    """All files but the one an example is written to."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "example" not in str(p.relative_to(folder)))
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def explained(error: HarnessError, code: int = 2) -> None:
    """An error as all are: code 2 and a hint."""
    assert error.exit_code == code, error
    assert "HINT:" in error.render(), error


# --- recipes and overrides

_VALID = resolved_yaml(load(DEBUG))
_VALID_DATA = yaml.safe_load(_VALID)


def _try_recipe(folder: Path) -> Try:
    path = folder / "example.yaml"
    again = folder / "example-again.yaml"

    def attempt(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            recipe = load(path)
        except HarnessError as error:
            explained(error)
        else:
            again.write_text(resolved_yaml(recipe))
            assert fingerprint(load(again)) == fingerprint(recipe)

    return attempt


def _dump(data: Any) -> str:
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False)


def _try_overrides(folder: Path) -> Try:
    def attempt(overrides: list[str]) -> None:
        try:
            assert isinstance(load(DEBUG, overrides), Recipe)
        except HarnessError as error:
            explained(error)

    return attempt


def _overrides() -> st.SearchStrategy[list[str]]:
    ways = st.sampled_from([".".join(map(str, way)) for way in paths_of(_VALID_DATA) if way])
    values = st.sampled_from(NASTY) | st.text(max_size=30) | SCALARS.map(str) | bombs()
    key = ways | st.text(max_size=10) | st.builds(".".join, st.lists(st.text(max_size=4), max_size=30))
    return st.lists(st.builds("{}={}".format, key, values) | st.text(max_size=30), min_size=1, max_size=4)


# --- converted data and checkpoints


def _try_data_manifest(folder: Path) -> Try:
    def attempt(text: str) -> None:
        (folder / "manifest.json").unlink(missing_ok=True)
        example = folder / "example-1234"
        example.mkdir(exist_ok=True)
        (example / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            read_manifest(example)
        except HarnessError as error:
            explained(error)

    return attempt


def signed(content: dict[str, Any]) -> str:
    """A data manifest whose checksum fits, whatever it says."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "manifest_sha256": digest})


_MANIFEST = {
    "source": "synthetic",
    "classes": ["a", "b"],
    "image_size_px": 32,
    "counts": {"train": 10, "test": 5},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "sha256": {"train.beton": "0" * 64, "test.beton": "0" * 64},
    "origin": "made",
    "format_version": 1,
    "fingerprint": "1234",
}


def json_texts(data: Any) -> st.SearchStrategy[str]:
    """JSON with values replaced, with parts of its text cut or replaced, or no JSON at all."""
    whole = json.dumps(data)
    return changes(data).map(json.dumps) | edits(whole) | st.text(max_size=60) | VALUES.map(json.dumps)


def _try_safetensors(folder: Path) -> Try:
    """The header is forged and the checkpoint's manifest made to fit, so that the reader itself is tried."""
    from harness.training import checkpoint

    example = folder / "example" / "step_1"
    example.mkdir(parents=True)
    state = json.dumps({"format_version": checkpoint.FORMAT_VERSION}).encode()

    def attempt(raw: bytes) -> None:
        files = {"model.safetensors": raw, "optimizer.safetensors": raw, "state.json": state}
        for name, content in files.items():
            (example / name).write_bytes(content)
        (example / "manifest.json").write_text(manifest_of(files))
        try:
            checkpoint.load(example)
        except HarnessError as error:
            explained(error)

    return attempt


def manifest_of(files: dict[str, bytes]) -> str:
    """A checkpoint's manifest that fits these files."""
    entries = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()}
    return json.dumps({"step": 1, "files": entries})


_HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}


def _safetensors() -> st.SearchStrategy[bytes]:
    def file(header: str, length: int | None, body: bytes) -> bytes:
        raw = header.encode("utf-8", "surrogateescape")
        return struct.pack("<Q", len(raw) if length is None else length) + raw + body

    lengths = st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 400)
    bodies = st.binary(max_size=64) | st.just(bytes(32))
    return st.builds(file, json_texts(_HEADER), lengths, bodies) | st.binary(max_size=100)


def _try_checkpoint_manifest(folder: Path) -> Try:
    from harness.training import checkpoint

    example = folder / "example" / "step_1"
    example.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (example / name).write_bytes(b"{}")
    (folder / "outside.safetensors").write_bytes(b"{}")

    def attempt(text: str) -> None:
        (example / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            checkpoint.load(example)
        except HarnessError as error:
            explained(error)

    return attempt


_CHECKPOINT = json.loads(
    manifest_of(dict.fromkeys(("model.safetensors", "optimizer.safetensors", "state.json"), b"{}"))
)
_CHECKPOINT["files"]["../../outside.safetensors"] = _CHECKPOINT["files"]["state.json"]

KINDS = {
    "recipe-edits": Kind("recipes: a valid one edited", edits(_VALID), _try_recipe, 0.24),
    "recipe-values": Kind("recipes: values replaced", changes(_VALID_DATA).map(_dump), _try_recipe, 0.16),
    "recipe-bombs": Kind("recipes: bombs, nesting, tags", bombs() | st.sampled_from(NASTY), _try_recipe, 0.08),
    "overrides": Kind("overrides", _overrides(), _try_overrides, 0.16),
    "data-manifests": Kind("data manifests", json_texts({**_MANIFEST}), _try_data_manifest, 0.08),
    "signed-data-manifests": Kind(
        "data manifests with a fitting checksum", changes(_MANIFEST).map(signed), _try_data_manifest, 0.08
    ),
    "checkpoint-manifests": Kind("checkpoint manifests", json_texts(_CHECKPOINT), _try_checkpoint_manifest, 0.10),
    "safetensors": Kind("safetensors headers, the manifest fitting", _safetensors(), _try_safetensors, 0.10),
}
