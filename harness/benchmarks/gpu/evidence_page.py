"""The evidence of a GPU machine as a section of a page, between two marks; the rest of the page stays as it is."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.benchmarks.gpu.evidence import read
from harness.benchmarks.gpu.step import PRECISIONS, WAYS
from harness.errors import HarnessError
from harness.files import write_text

BEGIN, END = "<!-- GPU evidence: written by scripts/gpu_evidence.py -->", "<!-- end of the GPU evidence -->"


def write(evidence_file: Path, page: Path) -> None:
    """Put the section into the page, in place of an earlier one or at its end; a page that is not there is made.

    Raises:
        HarnessError: no evidence in that file, or a dry run's.
    """
    content = read(evidence_file)
    if content is None or not content["parts"]:
        raise HarnessError("holds no evidence", where=str(evidence_file), hint="Run scripts/gpu_evidence.py on a GPU.")
    if content["dry_run"]:
        raise HarnessError(
            "is of a dry run, whose figures are no evidence",
            where=str(evidence_file),
            hint="Run scripts/gpu_evidence.py on a GPU, without --dry-run.",
        )
    text = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    section = f"{BEGIN}\n{render(content)}\n{END}"
    before, begin, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if begin else ""
    rest_of_page = f"\n{after.lstrip()}" if after.strip() else ""
    write_text(page, f"{before.rstrip()}\n\n{section}\n{rest_of_page}")


def render(content: Mapping[str, Any]) -> str:
    """Markdown of all parts that there are, each with its machine, day and command."""
    sections = {"tests": _tests, "loader": _loader, "step": _step, "train": _train}
    lines = ["## GPU"]
    for name, section in sections.items():
        entry = content["parts"].get(name)
        if entry is not None:
            lines += ["", *section(entry["figures"]), "", _origin(entry)]
    return "\n".join(lines)


def _origin(entry: Mapping[str, Any]) -> str:
    machine = entry["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    commit = (machine.get("git") or {}).get("commit")
    facts = [
        str(machine["gpu"] or machine["cpu"]),
        *([f"driver {machine['driver']}"] if machine.get("driver") else []),
        f"{machine['cpu_cores']} CPU cores",
        libraries,
        *([f"commit {commit[:10]}"] if commit else []),
        entry["started"][:10],
    ]
    state = "" if entry["complete"] else " Not complete."
    return f"`{entry['commands'][-1]}`: {'; '.join(facts)}.{state}"


def _tests(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "### Tests marked `gpu`"
    yield ""
    bad = figures.get("not_passed", [])
    yield f"{figures.get('passed', 0)} passed, {len(bad)} not passed, {figures.get('skipped', 0)} skipped."
    yield from (f"- not passed: `{name}`" for name in bad)


def _loader(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "### Loaders"
    yield ""
    if not figures:
        yield "Not measured: the time was over first."
        return
    settings = figures["settings"]
    yield f"{settings['images']:,} images ({settings['data']}), batches of {settings['batch_size']}."
    yield ""
    yield "| loader | images/s | lowest | highest | of what memory or the upload allows |"
    yield "|---|---|---|---|---|"
    for name, found in figures["contestants"].items():
        if found is None:
            yield f"| {name} | not installed | | | |"
            continue
        median, low, high = (found[f"images_per_second_{x}"] for x in ("median", "min", "max"))
        limit = figures["roofline"].get(f"{name}_images_per_second")
        share = "" if limit is None else f"{median / limit:.2%}"
        yield f"| {name} | {median:,.0f} | {low:,.0f} | {high:,.0f} | {share} |"


def _step(figures: Mapping[str, Any]) -> Iterator[str]:
    limit = figures["roofline"]
    counted = limit["elements_per_image"]
    yield f"### Training step of {figures['network']}"
    yield ""
    yield (
        f"Images/s, and the share of the memory roofline: {limit['copy_bytes_per_second'] / 1e12:.2f} TB/s measured by "
        f"a copy (read and written bytes), {counted['fused'] / 1e6:.2f} million elements an image (each layer a pass "
        f"of its own: {counted['layerwise'] / 1e6:.2f}), 2 bytes each in bf16 and 4 else; the rule stands in "
        "`harness/benchmarks/gpu/roofline.py`."
    )
    yield ""
    columns = sorted(limit["images_per_second"]["fused"], key=_precision_then_batch)
    yield "| | " + " | ".join(name.replace("/", ", batch ") for name in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for way in WAYS:
        cells = [_cell(figures["cases"].get(f"{way}/{column}")) for column in columns]
        yield f"| {way} | " + " | ".join(cells) + " |"
    roofs = [f"{limit['images_per_second']['fused'][column]:,.0f}" for column in columns]
    yield "| memory roofline | " + " | ".join(roofs) + " |"


def _precision_then_batch(column: str) -> tuple[int, int]:
    precision, batch_size = column.split("/")
    return PRECISIONS.index(precision), int(batch_size)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    if "left_out" in found:
        return str(found["left_out"]).replace("|", "/")
    return f"{found['images_per_second_median']:,.0f} ({found['share_of_roofline']:.1%})"


def _train(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "### Trainings"
    yield ""
    yield "| recipe | epochs | test accuracy | best | images/s, median epoch | training |"
    yield "|---|---|---|---|---|---|"
    for name, found in figures.items():
        if name == "failed":
            continue
        speeds = [e["images_per_second"] for e in found["epochs"] if "images_per_second" in e]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else ""
        result = found["result"]
        if result is None:
            yield f"| {name} | {found['epochs_done']:g}, not finished | | | {speed} | |"
            continue
        accuracy = f"{result['accuracy']:.2%} ({result['correct']:,} of {result['total']:,})"
        best = f"{result['best']['accuracy']:.2%} (epoch {result['best']['epoch']:g})"
        yield f"| {name} | {result['epoch']:g} | {accuracy} | {best} | {speed} | {result['seconds']:,.0f} s |"
