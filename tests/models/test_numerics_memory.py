"""What the numerics check reports and remembers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.models import numerics
from harness.models.kernel_check import Fault
from harness.models.safe_conv import SafeConv2d
from tests.models.planted import (
    OwnLinear,
    check,
    in_bf16,
    plant,
    two_convolutions,
    with_linear,
)


def test_report_as_json_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x, dilation: dilation > 1 and in_bf16(x))
    report = check(two_convolutions(), image_size_px=12)
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert fields["checked"] == report.checked == 2
    assert fields["layers"] == 3
    assert fields["wrong"][0]["layers"] == ["2", "3"]
    assert fields["wrong"][0]["path"] == "space_to_batch"
    assert fields["device"] == "cpu"
    assert report.seconds > 0
    assert not report.remembered
    kernel = dataclasses.replace(report.wrong[0], relative_error=float("inf"))
    infinite = dataclasses.replace(report, wrong=(kernel,))
    assert json.loads(json.dumps(infinite.to_json(), allow_nan=False))["wrong"][0]["relative_error"] is None
    assert "relative error inf" in infinite.render()
    assert check(two_convolutions()[:1], image_size_px=12).render().endswith("all right")


def forbid_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Fault]:
        raise AssertionError("checked again")

    monkeypatch.setattr(numerics, "check_kernel", fail)


def test_verdicts_and_paths_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x, dilation: dilation > 1 and in_bf16(x))
    first = check(two_convolutions(), cache_directory=tmp_path, image_size_px=12)
    (file,) = (tmp_path / "numerics").iterdir()  # and no temporary file
    stored = json.loads(file.read_text())
    assert stored["machine"]["torch"] == torch.__version__
    assert stored["machine"]["threads"] == str(torch.get_num_threads())
    with monkeypatch.context() as patch:
        forbid_checks(patch)
        model = two_convolutions()
        second = check(model, cache_directory=tmp_path, image_size_px=12)
    assert second.remembered
    assert not first.remembered
    assert second.wrong == first.wrong
    assert isinstance(model[2], SafeConv2d)
    assert "remembered" in second.render()
    wider = check(two_convolutions(), cache_directory=tmp_path, image_size_px=16)
    assert not wider.remembered
    with monkeypatch.context() as patch:
        forbid_checks(patch)  # other sizes are added to what is known
        assert check(two_convolutions(), cache_directory=tmp_path, image_size_px=12).remembered


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"machine": {}, "verdicts": {}}', '{"verdicts": 3}', "\x00\xff", "DAMAGED VERDICTS"],
)
def test_a_broken_memory_is_no_verdict(content: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    check(model, cache_directory=tmp_path, image_size_px=8)
    (file,) = (tmp_path / "numerics").iterdir()
    if content == "DAMAGED VERDICTS":
        stored = json.loads(file.read_text())
        stored["verdicts"] = {key: [["output"]] for key in stored["verdicts"]}
        content = json.dumps(stored)
    file.write_text(content, encoding="latin-1")
    assert not check(model, cache_directory=tmp_path, image_size_px=8).remembered
    assert check(model, cache_directory=tmp_path, image_size_px=8).remembered


def test_threads_precision_and_format_have_verdicts_of_their_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    threads = torch.get_num_threads()
    try:
        for count in (threads, threads + 1):
            torch.set_num_threads(count)
            for settings in ({}, {"precision": "no"}, {"memory_format": "contiguous"}):
                report = check(model, cache_directory=tmp_path, image_size_px=8, **settings)
                assert not report.remembered
    finally:
        torch.set_num_threads(threads)
    assert len(list((tmp_path / "numerics").iterdir())) == 6


def test_layers_of_unknown_versions_are_checked_each_time(tmp_path: Path) -> None:
    model = with_linear(OwnLinear(lambda g: g, reduced=False))
    for _ in range(2):
        assert not check(model, cache_directory=tmp_path, image_size_px=8).remembered
    (file,) = (tmp_path / "numerics").iterdir()
    assert "OwnLinear" not in file.read_text()
    assert "Conv2d" in file.read_text()


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert check(model, cache_directory=blocked, image_size_px=8).wrong == ()
    assert blocked.read_text() == "not a directory"
