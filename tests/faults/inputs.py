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
from harness.recipe import load
from harness.recipe.loading import fingerprint, resolved_yaml
from harness.training import checkpoint
from tests.fork_server import ROOT

LIMIT_SECONDS = 10.0  # a hundred times what the slowest takes on a quiet machine
DEBUG = ROOT / "recipes" / "debug.yaml"
Try = Callable[[Any], object]

NASTY = (
    "!!python/object/apply:os.system ['touch canary']",
    *('!!python/object/new:subprocess.Popen [["touch", "canary"]]', "!!python/name:os.system"),
    *("!!python/module:canary", "!!python/tuple [1]"),
    *("!<tag:yaml.org,2002:python/object/apply:eval> [\"open('canary','w')\"]", "!!binary Y2FuYXJ5"),
    *("!!timestamp 2026-01-01", "!!set {a, b}", "!x y", "&a [*a, *a]", "&a {<<: *a}", "<<: {a: 1}", "*nowhere"),
    *("%YAML 9.9", "---\n---\n", "...", "? ", "- - - - - -", "{" * 40, "[" * 400, "'", '"\\x00\\ud800"', "\x00"),
    *("﻿", "\u2028", "\udcff", "💥" * 9, "0x" + "f" * 4000, "-" * 3000, "9" * 4400, "1e999999999", "1:1:1:1"),
    *(".nan", "-.inf", "0o777", "1_000", "~", "=", "| \n\t x", ">-\n", "${HOME}", "$(touch canary)"),
    *("`touch canary`", "../" * 30 + "etc/passwd", "/dev/zero", "/proc/self/mem", "#" * 200),
)


def bombs() -> st.SearchStrategy[str]:
    """Documents that grow when they are read: aliases of aliases, merges, nesting."""

    def laughs(levels: int, wide: int) -> str:
        lines = [f"a0: &a0 [{'x, ' * wide}]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, levels)]
        return "\n".join(lines)

    return st.one_of(
        st.builds(laughs, st.integers(2, 12), st.integers(2, 12)),
        st.builds(lambda n: "a: " + "[" * n, st.integers(1, 9000)),
        st.builds(lambda n: "{a: " * n + "1" + "}" * n, st.integers(1, 3000)),
        st.builds(lambda n: "".join(" " * i + "a:\n" for i in range(n)), st.integers(1, 200)),
        st.builds(lambda n: "training: {epochs: " + "9" * n + "}", st.integers(1, 20000)),
        st.builds(lambda n: "".join(f"k{i}: {i}\n" for i in range(n)), st.integers(1, 500)),
        st.builds(lambda n: "name: " + "💥" * n + "\ntraining: {epochs: 1}", st.integers(1, 9000)),
        st.builds(lambda n: "a: [" + "1," * n + "]", st.integers(1, 3000)),
    )


def edits(whole: str) -> st.SearchStrategy[str]:
    """A valid text with some of its parts cut out, doubled, or replaced by something nasty."""
    places = st.integers(0, len(whole))
    put = st.sampled_from(NASTY) | st.text(max_size=12)
    edit = st.tuples(places, st.integers(0, 30), put)

    def apply(made: list[tuple[int, int, str]]) -> str:
        text = whole
        for at, length, new in made:
            text = text[:at] + new + text[at + length :]
        return text

    return st.lists(edit, min_size=1, max_size=4).map(apply)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(2**63), 10**300, 2**31, 0, -1, "", "\x00", "../x", "a" * 5000])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def paths_of(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value of a nested structure."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [prefix, *(way for key, value in inside for way in paths_of(value, (*prefix, key)))]


def changed(data: Any, changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
    """A copy with values replaced, as far as the way to them is still there."""
    whole = json.loads(json.dumps(data))
    for way, value in changes:
        if not way:
            return value
        target = whole
        try:
            for key in way[:-1]:
                target = target[key]
            if isinstance(target, dict) == isinstance(way[-1], str):  # else another change was there before
                target[way[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    return whole


def changes(data: Any, values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    ways = st.sampled_from([way for way in paths_of(data) if way])
    return st.lists(st.tuples(ways, values), min_size=1, max_size=3).map(lambda c: changed(data, c))


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
        try:
            with limited(LIMIT_SECONDS):
                attempt(example)
        except HarnessError as error:  # as all are: code 2 and a hint
            assert error.exit_code == 2, error
            assert "HINT:" in error.render(), error

    try:
        each()
    except Exception as error:  # whatever an example gave: it is the finding
        text = f"{type(error).__name__}: {error}; {'; '.join(getattr(error, '__notes__', []))}"
        return tried, text[:1000]
    if [*folder.rglob("*canary*"), *Path.cwd().glob("canary")]:
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


def _contents(folder: Path) -> dict[str, bytes]:
    """All files but the one an example is written to."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "example" not in str(p.relative_to(folder)))
    return {str(p): p.read_bytes() for p in files}


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _try_recipe(folder: Path) -> Try:
    path, again = folder / "example.yaml", folder / "example-again.yaml"

    def attempt(text: str) -> None:
        path.write_bytes(_bytes(text))
        recipe = load(path)
        again.write_text(resolved_yaml(recipe))
        assert fingerprint(load(again)) == fingerprint(recipe)

    return attempt


def _try_overrides(folder: Path) -> Try:
    return lambda overrides: load(DEBUG, overrides)


def _try_data_manifest(folder: Path) -> Try:
    example = folder / "example-1234"
    example.mkdir()

    def attempt(text: str) -> None:
        (example / "manifest.json").write_bytes(_bytes(text))
        read_manifest(example)

    return attempt


def _try_safetensors(folder: Path) -> Try:
    """The header is forged and the checkpoint's manifest made to fit, so that the reader itself is tried."""
    example = folder / "example" / "step_1"
    example.mkdir(parents=True)
    state = json.dumps({"format_version": checkpoint.FORMAT_VERSION}).encode()

    def attempt(raw: bytes) -> None:
        files = {"model.safetensors": raw, "optimizer.safetensors": raw, "state.json": state}
        for name, content in files.items():
            (example / name).write_bytes(content)
        (example / "manifest.json").write_text(manifest_of(files))
        checkpoint.load(example)

    return attempt


def _try_checkpoint_manifest(folder: Path) -> Try:
    example = folder / "example" / "step_1"
    example.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        (example / name).write_bytes(b"{}")
    (folder / "outside.safetensors").write_bytes(b"{}")

    def attempt(text: str) -> None:
        (example / "manifest.json").write_bytes(_bytes(text))
        checkpoint.load(example)

    return attempt


def signed(content: dict[str, Any]) -> str:
    """A data manifest whose checksum fits, whatever it says."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "manifest_sha256": digest})


def manifest_of(files: dict[str, bytes]) -> str:
    """A checkpoint's manifest that fits these files."""
    entries = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in files.items()}
    return json.dumps({"step": 1, "files": entries})


VALID = resolved_yaml(load(DEBUG))
VALID_DATA = yaml.safe_load(VALID)
MANIFEST = {
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
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
CHECKPOINT = json.loads(manifest_of(dict.fromkeys((*CHECKPOINT_FILES, "../../outside.safetensors"), b"{}")))
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}


def json_texts(data: Any) -> st.SearchStrategy[str]:
    """JSON with values replaced, with parts of its text cut or replaced, or no JSON at all."""
    whole = json.dumps(data)
    return changes(data).map(json.dumps) | edits(whole) | st.text(max_size=60) | VALUES.map(json.dumps)


def _yaml_texts() -> st.SearchStrategy[str]:
    return changes(VALID_DATA).map(lambda data: yaml.safe_dump(data, allow_unicode=True, sort_keys=False))


def _overrides() -> st.SearchStrategy[list[str]]:
    ways = st.sampled_from([".".join(map(str, way)) for way in paths_of(VALID_DATA) if way])
    values = st.sampled_from(NASTY) | st.text(max_size=30) | SCALARS.map(str) | bombs()
    key = ways | st.text(max_size=10) | st.builds(".".join, st.lists(st.text(max_size=4), max_size=30))
    return st.lists(st.builds("{}={}".format, key, values) | st.text(max_size=30), min_size=1, max_size=4)


def _safetensors() -> st.SearchStrategy[bytes]:
    def file(header: str, length: int | None, body: bytes) -> bytes:
        raw = _bytes(header)
        return struct.pack("<Q", len(raw) if length is None else length) + raw + body

    lengths = st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 400)
    bodies = st.binary(max_size=64) | st.just(bytes(32))
    return st.builds(file, json_texts(HEADER), lengths, bodies) | st.binary(max_size=100)


KINDS = {
    "recipe-edits": Kind("recipes: a valid one edited", edits(VALID), _try_recipe, 0.24),
    "recipe-values": Kind("recipes: values replaced", _yaml_texts(), _try_recipe, 0.16),
    "recipe-bombs": Kind("recipes: bombs, nesting, tags", bombs() | st.sampled_from(NASTY), _try_recipe, 0.08),
    "overrides": Kind("overrides", _overrides(), _try_overrides, 0.16),
    "data-manifests": Kind("data manifests", json_texts(MANIFEST), _try_data_manifest, 0.08),
    "signed-data-manifests": Kind(
        "data manifests with a fitting checksum", changes(MANIFEST).map(signed), _try_data_manifest, 0.08
    ),
    "checkpoint-manifests": Kind("checkpoint manifests", json_texts(CHECKPOINT), _try_checkpoint_manifest, 0.10),
    "safetensors": Kind("safetensors headers, the manifest fitting", _safetensors(), _try_safetensors, 0.10),
}
