"""How bad examples are made: something nasty put into something valid, and documents that grow when they are read."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

NASTY = (
    "!!python/object/apply:os.system ['touch canary']",
    '!!python/object/new:subprocess.Popen [["touch", "canary"]]',
    "!!python/name:os.system",
    "!!python/module:canary",
    "!!python/tuple [1]",
    "!<tag:yaml.org,2002:python/object/apply:eval> [\"open('canary','w')\"]",
    "!!binary Y2FuYXJ5",
    "!!timestamp 2026-01-01",
    "!!set {a, b}",
    "!x y",
    "&a [*a, *a]",
    "&a {<<: *a}",
    "<<: {a: 1}",
    "*nowhere",
    "%YAML 9.9",
    "---\n---\n",
    "...",
    "? ",
    "- - - - - -",
    "{" * 40,
    "[" * 400,
    "'",
    '"\\x00\\ud800"',
    "\x00",
    "﻿",
    "\u2028",
    "\udcff",
    "💥" * 9,
    "0x" + "f" * 4000,
    "-" * 3000,
    "9" * 4400,
    "1e999999999",
    "1:1:1:1",
    ".nan",
    "-.inf",
    "0o777",
    "1_000",
    "~",
    "=",
    "| \n\t x",
    ">-\n",
    "${HOME}",
    "$(touch canary)",
    "`touch canary`",
    "../" * 30 + "etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "#" * 200,
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
