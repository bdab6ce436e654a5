"""Puts a kit together again: verifies every part, joins them, verifies every file. `python3 unpack.py DESTINATION`.

A kit is a folder with `kit.json`, the parts that it names, and this file as `unpack.py`. It is there for machines that
can fetch nothing, so it stands on Python's own library alone: it is copied into the kit without the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

INDEX_FILE = "kit.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 20


class KitError(Exception):
    """What is wrong with a kit, and a line `HINT:` with what to do."""

    def __init__(self, what: str, *, hint: str) -> None:
        super().__init__(f"{what}\n  HINT: {hint}")


def unpack(kit: Path, destination: Path, groups: Sequence[str] = ()) -> list[Path]:
    """Verify a kit's parts and write its files below `destination`; a file appears whole or not at all.

    Args:
        kit: the folder with `kit.json` and the parts.
        destination: made if it is not there.
        groups: only these groups of files; none is all of them.

    Returns:
        The files written.

    Raises:
        KitError: names every part that is missing, cut short or changed (nothing is written then), an index that is
            broken, or a group that is not in it.
    """
    index = read_index(kit)
    unknown = [name for name in groups if name not in index]
    if unknown:
        raise KitError(f'the kit has no group "{unknown[0]}"', hint=f"Its groups: {', '.join(index)}.")
    chosen = {name: index[name] for name in groups or index}
    problems = [text for group in chosen.values() for part in group["parts"] if (text := _problem(kit, part))]
    if problems:
        raise KitError("the kit is not whole:\n    " + "\n    ".join(problems), hint="Carry these parts again.")
    return [path for group in chosen.values() for path in _join(kit, destination, group)]


def read_index(kit: Path) -> dict[str, Any]:
    """The groups of a kit: of each the parts and the files, with name or path, bytes and sha256.

    Raises:
        KitError: the index is missing, broken or of another format.
    """
    path, hint = kit / INDEX_FILE, "Carry it again, from the same kit as the parts."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise KitError(f"{path} has format {content['format']}, not {FORMAT}", hint="Make the kit again.")
        groups: dict[str, Any] = content["groups"]
        paths = [file["path"] for group in groups.values() for file in group["files"]]
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror or error}", hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KitError(f"{path} is broken", hint=hint) from error
    outside = [text for text in paths if Path(text).is_absolute() or ".." in Path(text).parts]
    if outside:
        raise KitError(f"{path} names a file outside the destination: {outside[0]}", hint=hint)
    return groups


def digest_of(file: BufferedReader) -> str:
    """SHA-256 of the rest of an open file, lower-case hexadecimal digits."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(kit: Path, part: dict[str, Any]) -> str | None:
    path = kit / part["name"]
    try:
        size = path.stat().st_size
        if size != part["bytes"]:
            return f"{part['name']}: has {size:,} bytes instead of {part['bytes']:,}"
        with path.open("rb") as file:
            changed = digest_of(file) != part["sha256"]
    except FileNotFoundError:
        return f"{part['name']}: is missing"
    except OSError as error:
        return f"{part['name']}: cannot be read: {error.strerror or error}"
    return f"{part['name']}: damaged, its SHA-256 is not that of {INDEX_FILE}" if changed else None


def _join(kit: Path, destination: Path, group: dict[str, Any]) -> Iterator[Path]:
    """The parts are one stream of bytes, the files one behind the other."""
    stream = _read([kit / part["name"] for part in group["parts"]])
    buffer = b""
    for entry in group["files"]:
        path = destination / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, digest, left = path.with_name(f".{path.name}.tmp"), hashlib.sha256(), entry["bytes"]
        with temporary.open("wb") as file:
            while left:
                buffer = buffer or next(stream, b"")
                if not buffer:
                    break
                piece, buffer = buffer[:left], buffer[left:]
                digest.update(piece)
                file.write(piece)
                left -= len(piece)
        if left or digest.hexdigest() != entry["sha256"]:
            temporary.unlink()
            raise KitError(f"{entry['path']}: does not come out as it was packed", hint="Make the kit again.")
        temporary.replace(path)
        yield path


def _read(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where the kit is not whole."""
    parser = argparse.ArgumentParser(description="Verify the parts beside this file and put their files together.")
    parser.add_argument("destination", type=Path, help="the folder to write below; made if it is not there")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="only these groups, such as wheels or data")
    parser.add_argument("--kit", type=Path, default=Path(__file__).resolve().parent, help="the folder with the parts")
    options = parser.parse_args(arguments)
    try:
        written = unpack(options.kit, options.destination, options.groups)
    except KitError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} files, {sum(path.stat().st_size for path in written):,} bytes, in {options.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
