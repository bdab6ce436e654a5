"""Packs a kit for a machine that can fetch nothing: files in parts of a size that travels, with their SHA-256.

    python -m harness.benchmarks.gpu.kit_parts OUT --python 3.12 --wheels DIR [--data cifar10] [--part-mb 60]

`scripts/gpu_kit.sh` calls it; `kit_unpack` is the other end.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.benchmarks.gpu import kit_unpack
from harness.benchmarks.gpu.kit_unpack import FORMAT, INDEX_FILE, digest_of
from harness.errors import EXIT_DONE, HarnessError, print_error
from harness.files import write_json, write_text

BYTES_A_MB = 1_000_000
DEFAULT_PART_MB = 60
_CHUNK_BYTES = 1 << 20

Sources = Sequence[tuple[Path, str]]  # a file here, and its path below the destination there


def pack(groups: Mapping[str, Sources], out: Path, *, part_limit_bytes: int) -> dict[str, Any]:
    """Write parts, `kit.json` and `unpack.py` into `out`; parts of an older kit there are removed.

    The files of a group are one stream, cut into the fewest parts that the limit allows, of nearly equal size. A
    group can so be carried without the others.

    Args:
        groups: files by the name of their group; an empty group is left out.
        out: made if it is not there.
        part_limit_bytes: largest part.

    Returns:
        The content of `kit.json`.

    Raises:
        HarnessError: a limit below 1 byte, no files at all, or a folder with other things in it.
    """
    if part_limit_bytes < 1:
        raise HarnessError("a part must have room for a byte", hint="Give --part-mb a number above 0, such as 60.")
    groups = {name: files for name, files in groups.items() if files}
    if not groups:
        raise HarnessError("there is nothing to pack", hint="Give a folder with wheels, or the data.")
    _clear(out)
    index: dict[str, Any] = {"format": FORMAT, "part_limit_bytes": part_limit_bytes, "groups": {}}
    for name, sources in groups.items():
        files = []
        for source, path in sources:
            with source.open("rb") as file:
                files.append({"path": path, "bytes": source.stat().st_size, "sha256": digest_of(file)})
        parts = _cut(name, sources, out, part_limit_bytes)
        index["groups"][name] = {"parts": parts, "files": files}
    write_json(out / INDEX_FILE, index)
    shutil.copyfile(kit_unpack.__file__, out / "unpack.py")
    return index


def _clear(out: Path) -> None:
    """Remove an older kit; what is not of a kit is left alone, and refused."""
    out.mkdir(parents=True, exist_ok=True)
    own = {INDEX_FILE, "unpack.py", "README.txt"}
    present = list(out.iterdir())
    foreign = [path.name for path in present if path.name not in own and path.suffix != ".part"]
    if foreign:
        raise HarnessError(
            f"holds something else: {foreign[0]}", where=str(out), hint="Give a folder of its own with --out."
        )
    for path in present:
        path.unlink()


def _cut(name: str, sources: Sources, out: Path, limit_bytes: int) -> list[dict[str, Any]]:
    total = sum(source.stat().st_size for source, _ in sources)
    count = max(1, -(-total // limit_bytes))
    size = -(-total // count)
    parts: list[dict[str, Any]] = []
    stream = (chunk for source, _ in sources for chunk in _chunks(source))
    buffer = b""
    for number in range(1, count + 1):
        path = out / f"{name}-{number}-of-{count}.part"
        digest, written = hashlib.sha256(), 0
        with path.open("wb") as file:
            while written < size and (buffer := buffer or next(stream, b"")):
                piece, buffer = buffer[: size - written], buffer[size - written :]
                file.write(piece)
                digest.update(piece)
                written += len(piece)
        parts.append({"name": path.name, "bytes": written, "sha256": digest.hexdigest()})
    return parts


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def wheels_of(folder: Path) -> Sources:
    """Every wheel of a folder, to lie in `wheels/` there."""
    return [(path, f"wheels/{path.name}") for path in sorted(folder.glob("*.whl"))]


def data_of(source: str) -> Sources:
    """The input files of a data source as `harness.data.sources` finds them here, to lie in `data/` there.

    The files themselves travel, not a converted copy: that one knows its input by path and time, and would be made
    again.

    Raises:
        HarnessError: there are none on this machine, or they lie in several folders.
    """
    from harness.data.sources import locate  # needs the libraries of the project, which packing wheels does not

    files = sorted(locate(source, download=False).files)
    if len({path.parent for path in files}) != 1:
        raise HarnessError(
            f"the files of {source} lie in several folders", hint="Pack Parquet files, batches or the archive."
        )
    if len(files) == 1:  # an archive
        return [(files[0], f"data/{files[0].name}")]
    folder = source if files[0].suffix == ".parquet" else files[0].parent.name  # by which it is found again
    return [(path, f"data/{folder}/{path.name}") for path in files]


def readme(index: Mapping[str, Any], *, python: str) -> str:
    """What to carry and what to run there, for README.txt."""
    rows = [
        f"  {part['name']:<28}{part['bytes']:>14,} bytes   {name}"
        for name, group in index["groups"].items()
        for part in group["parts"]
    ]
    limit_mb = index["part_limit_bytes"] / BYTES_A_MB
    return _README.format(python=python, limit_mb=f"{limit_mb:g}", parts="\n".join(rows))


_README = """\
What an offline GPU machine lacks: wheels for Python {python} (FFCV is self-contained) and the data.
torch and torchvision are expected there.

Carry this folder and the repository. Where little can be carried at a time, carry kit.json and unpack.py with the first
part, then one part after the other (each at most {limit_mb} MB) into the same folder. Without the part of the data all
but the trainings runs, on random images.

{parts}

There, in the repository, with KIT this folder and PLACE a folder for what comes out:

  python3 KIT/unpack.py PLACE                  # or: python3 KIT/unpack.py PLACE wheels
  python3 -m pip install --no-index --no-deps --no-compile --upgrade --target PLACE/site PLACE/wheels/*.whl
  export PYTHONPATH=$PWD:PLACE/site HARNESS_DATA=PLACE/data HARNESS_CACHE=PLACE/cache
  python3 scripts/gpu_evidence.py --out PLACE/evidence.json --work PLACE/evidence-runs

A damaged or missing part is named. The last command ends within nine minutes; code 75 says that there is more to do:
run it again, with the same --out and --work, which holds the trainings' checkpoints. Code 0: all is done. Bring
evidence.json back: `scripts/gpu_evidence.py --out evidence.json --page docs/benchmarks.md` writes the page.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description="Pack wheels and data in parts.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", required=True, help="version that the wheels are for, such as 3.12")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels")
    parser.add_argument("--data", help="a data source, such as cifar10")
    parser.add_argument("--part-mb", type=float, default=DEFAULT_PART_MB, help="largest part, in 1,000,000 bytes")
    options = parser.parse_args(arguments)
    try:
        if not math.isfinite(options.part_mb):
            raise HarnessError(
                f"must be a number, not {options.part_mb}", where="--part-mb", hint="Give one above 0, such as 60."
            )
        groups = {
            "wheels": wheels_of(options.wheels) if options.wheels else [],
            "data": data_of(options.data) if options.data else [],
        }
        index = pack(groups, options.out, part_limit_bytes=int(options.part_mb * BYTES_A_MB))
        write_text(options.out / "README.txt", readme(index, python=options.python))
    except HarnessError as error:
        print_error(error)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
