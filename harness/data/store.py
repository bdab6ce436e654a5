"""A converted data set on disk: two `.beton` files and the manifest that tells whether they are whole.

    <source>-<fingerprint>/train.beton, test.beton, manifest.json

The manifest carries the SHA-256 of both files and of itself, so a changed bit anywhere is found.

Shapes: B images, H height, W width, C = 3 channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.data.beton import open_beton
from harness.errors import HarnessError, nearest
from harness.files import hex_digest, replacing

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
BETON_FILES: Mapping[str, str] = {"train": "train.beton", "test": "test.beton"}  # by split
_SELF_DIGEST = "manifest_sha256"
_AGAIN_HINT = "Make the data again: harness data prepare --force RECIPE"

SplitName = Literal["train", "test"]


@dataclass(frozen=True)
class Manifest:
    """What a converted data set holds.

    Attributes:
        source: the name of the source.
        classes: class names; a label is an index into them.
        image_size_px: height and width of all images.
        counts: images in "train" and "test".
        mean, std: of the training pixels, one a channel (red, green, blue), pixels scaled to [0, 1]; std is that
            of the population.
        sha256: of each `.beton` file, by its name.
        origin: where the images came from, for people.
        format_version: of the store's layout.
        fingerprint: of the input, the last part of the folder's name.
    """

    source: str
    classes: tuple[str, ...]
    image_size_px: int
    counts: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: Mapping[str, str]
    origin: str
    format_version: int = FORMAT_VERSION
    fingerprint: str = ""

    def to_json(self) -> str:
        """The text of manifest.json, with a checksum of its own."""
        content = dataclasses.asdict(self)
        return json.dumps({**content, _SELF_DIGEST: _digest(content)}, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            ValueError: anything in the text is not as it was written; the message says what.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        found = content.pop(_SELF_DIGEST, None)
        names = {field.name for field in dataclasses.fields(Manifest)}
        if set(content) != names or found != _digest(content):
            raise ValueError("its checksum does not fit its content")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {content['format_version']}, not {FORMAT_VERSION}")
        wrong = [name for name, fits in _FORMS.items() if not fits(content[name])]
        if wrong:
            raise ValueError(f"its {wrong[0]} is not of the right form")
        for name in ("classes", "mean", "std"):
            content[name] = tuple(content[name])
        return Manifest(**content)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_per_channel(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, float | int) for v in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What a manifest's entries must look like, which a checksum that fits does not say.
_FORMS: Mapping[str, Callable[[Any], bool]] = {
    "source": _is_text,
    "classes": lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
    "image_size_px": _is_count,
    "counts": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "mean": _is_per_channel,
    "std": _is_per_channel,
    "sha256": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "origin": _is_text,
    "fingerprint": _is_text,
}


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a converted data set: a `.beton` file and its arrays, as `open_beton` gives them.

    Attributes:
        path: the file.
        images_BHWC: uint8 (B, H, W, 3), read-only, mapped from the file.
        labels_B: int64 (B,).
    """

    path: Path
    images_BHWC: np.ndarray  # noqa: N815
    labels_B: np.ndarray  # noqa: N815

    @staticmethod
    def open(path: Path) -> Split:
        """Map a `.beton` file. Raises HarnessError as `open_beton`."""
        return Split(path, *open_beton(path))

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.labels_B)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process gets the path and maps the file itself, not a copy of every pixel.
        return Split.open, (self.path,)


@dataclass(frozen=True)
class DataStore:
    """A folder with a converted data set, and its manifest."""

    directory: Path
    manifest: Manifest

    def split(self, name: SplitName) -> Split:
        """The split "train" or "test".

        Raises:
            HarnessError: another name, or a file that has been damaged since the store was checked.
        """
        if name not in BETON_FILES:
            raise HarnessError(f'there is no split "{name}"', hint=nearest(name, BETON_FILES))
        return Split.open(self.directory / BETON_FILES[name])


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, complete or not at all."""
    with replacing(directory / MANIFEST_FILE) as file:
        file.write(manifest.to_json().encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        HarnessError: it is missing or changed.
    """
    path = directory / MANIFEST_FILE
    try:
        return Manifest.from_json(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise HarnessError("is missing", where=str(path), hint=_AGAIN_HINT) from error
    except OSError as error:
        raise HarnessError(f"cannot be read: {error.strerror or error}", where=str(path), hint=_AGAIN_HINT) from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or not as written
        raise HarnessError(f"damaged: {error}", where=str(path), hint=_AGAIN_HINT) from error


def verify(directory: str | Path) -> list[str]:
    """Everything that is wrong with a store, one sentence each; empty where it is whole.

    Reads every byte (0.2 s for CIFAR-10): checksums, then counts, image size and labels.
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
    except HarnessError as error:
        return [f"{error.where}: {error.what}"]
    problems = []
    if not directory.name.endswith(f"-{manifest.fingerprint}"):
        problems.append(f"{directory}: holds the data set {manifest.source}-{manifest.fingerprint}")
    digests: dict[str, str] = {}
    for name in BETON_FILES.values():
        try:
            digests[name] = hex_digest(directory / name)
        except FileNotFoundError:
            problems.append(f"{directory / name}: is missing")
        except OSError as error:
            problems.append(f"{directory / name}: cannot be read: {error.strerror or error}")
    changed = [name for name, digest in digests.items() if digest != manifest.sha256.get(name)]
    if len(changed) == 2 and sorted(digests.values()) == sorted(manifest.sha256.values()):
        return [*problems, f"{directory}: train.beton and test.beton are swapped"]
    for split, name in BETON_FILES.items():
        if name in changed:
            problems.append(f"{directory / name}: {_what_changed(directory / name, manifest, split)}")
        elif name in digests:
            problems += _misfits(directory / name, manifest, split)
    return problems


def _what_changed(path: Path, manifest: Manifest, split: str) -> str:
    """More than that the checksum differs, where the file's structure shows more."""
    try:
        _, labels_B = open_beton(path)
    except HarnessError as error:
        return f"{error.what} (its SHA-256 is not that of the manifest)"
    if len(labels_B) != manifest.counts.get(split):
        return f"holds {len(labels_B)} images where the manifest says {manifest.counts.get(split)}"
    return "damaged: its SHA-256 is not that of the manifest; pixels or labels have changed"


def _misfits(path: Path, manifest: Manifest, split: str) -> list[str]:
    try:
        images_BHWC, labels_B = open_beton(path)
    except HarnessError as error:
        return [f"{path}: {error.what}"]
    found = (len(labels_B), *images_BHWC.shape[1:3])
    wanted = (manifest.counts.get(split), manifest.image_size_px, manifest.image_size_px)
    problems = []
    if found != wanted:
        problems.append(f"{path}: count, height and width are {found} where the manifest says {wanted}")
    if labels_B.max() >= len(manifest.classes):
        problems.append(f"{path}: label {labels_B.max()} where there are {len(manifest.classes)} classes")
    return problems


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
