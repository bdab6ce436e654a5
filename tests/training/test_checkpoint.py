"""Checkpoints come back to the bit, or are refused by name; the training waits for the copy, not for the disk."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from harness.errors import HarnessError
from harness.training import checkpoint
from harness.training.checkpoint import Checkpointer
from harness.training.optim import build_optimizer
from harness.training.state import Progress

IDENTITY = {"classes": ["cat", "dog"], "mean": [0.5] * 3, "std": [0.25] * 3, "data_sha256": {"train.beton": "0"}}
# Of a single rank; no Accelerator is needed to write files.
ALONE: Any = SimpleNamespace(is_main=True, accelerator=SimpleNamespace(scaler=None))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def checkpointer(folder: Path, name: str = "sgd", *, keep_last: int = 9) -> Checkpointer:
    """Of a network after a first step."""
    model = network()
    optimizer = build_optimizer(
        model, name=name, lr=0.01, momentum=0.9, nesterov=False, weight_decay=0.01, decay_norm_and_bias=False, args={}
    )
    step: Any = SimpleNamespace(runtime=ALONE, unwrapped_model=model, raw_optimizer=optimizer, ema=None)
    found = Checkpointer(folder, step, IDENTITY, keep_last, keep_best=True)
    train_step(found, 0)
    return found


def train_step(each: Checkpointer, seed: int) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    F.cross_entropy(each.step.unwrapped_model(images), torch.tensor([0, 1, 2, 0])).backward()
    each.step.raw_optimizer.step()
    each.step.raw_optimizer.zero_grad()


def write(folder: Path, step: int, *, by: Checkpointer | None = None) -> Path:
    by = by or checkpointer(folder)
    by.save(Progress(step=step))
    by.close()
    by.wait()
    return folder / f"step_{step}"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "lamb"])
def test_training_resumes_bit_equal_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    one, other = checkpointer(tmp_path, name), checkpointer(tmp_path, name)
    saved = checkpoint.load(write(tmp_path, 1, by=one))
    with torch.no_grad():
        for parameter in other.step.unwrapped_model.parameters():
            parameter.add_(1)
    assert other.restore(saved) == Progress(step=1)
    for seed in (1, 2):
        train_step(one, seed)
        train_step(other, seed)
    left, right = (each.step.unwrapped_model.state_dict() for each in (one, other))
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    assert names(tmp_path) == {"step_1"}
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1  # the user's umask, for all files alike


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    one = checkpointer(tmp_path, keep_last=2)
    score: Any = {"step": 2, "epoch": 1.0, "test": {"loss": 1.0, "accuracy": 0.5, "correct": 1, "total": 2}}
    (tmp_path / ".step_12.999.tmp").mkdir()
    for step in (1, 2, 9, 10, 11):
        one.save(Progress(step=step, best=score if step >= 2 else None))
    one.close()
    assert names(tmp_path) == {"step_2", "step_10", "step_11"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "step_1"
    if not path.exists():
        write(tmp_path, 1)
    file = path / data.draw(st.sampled_from(sorted(names(path))))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))])
    file.write_bytes(whole[:at] + (flipped + whole[at + 1 :] if data.draw(st.booleans()) else b""))
    try:
        assert checkpoint.load(path).progress.step == 1
        assert file.name == "manifest.json"  # spacing, or the step's number there: nothing a load relies on
    except HarnessError as error:
        assert error.exit_code == 2
        assert "HINT" in str(error)
    finally:
        file.write_bytes(whole)


def test_missing_file_and_missing_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 7)
    with pytest.raises(HarnessError, match=r"manifest\.json is missing"):
        checkpoint.load(path.with_name("step_8"))
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(HarnessError, match=r"optimizer\.safetensors is missing"):
        checkpoint.load(path)


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files": {', '"files": {"../x": {"sha256": "", "bytes": 0},'))
    (tmp_path / "x").write_text("")
    with pytest.raises(HarnessError, match="is missing"):
        checkpoint.load(path)


@pytest.mark.parametrize("left_out", ["step", "best", "epoch_loader_wait_seconds"])
def test_a_state_without_an_entry_is_refused_except_for_what_older_ones_lack(tmp_path: Path, left_out: str) -> None:
    path = write(tmp_path, 3)
    state, manifest = (json.loads((path / name).read_text()) for name in ("state.json", "manifest.json"))
    del state["progress"][left_out]
    content = json.dumps(state).encode()
    (path / "state.json").write_bytes(content)
    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    if left_out == "epoch_loader_wait_seconds":
        assert checkpoint.load(path).progress == Progress(step=3)
    else:
        with pytest.raises(HarnessError, match=f"not what a training writes: progress.{left_out}: field required"):
            checkpoint.load(path)


def test_an_existing_checkpoint_survives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_synced", full)  # a full disk, without filling one
    one = checkpointer(tmp_path)
    one.save(Progress(step=2))
    with pytest.raises(HarnessError, match=r"step 2 could not be written.*No space left") as caught:
        one.save(Progress(step=3))
    one.wait()
    one.close()
    assert caught.value.exit_code == 1
    assert names(tmp_path) == {"step_1"}
    checkpoint.load(path)


def test_a_checkpoint_whose_successor_did_not_come_is_put_back(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    path.rename(tmp_path / ".step_1.replaced")  # as after a kill between the two renames
    assert checkpoint.last_good(tmp_path) == (path, [])
    write(tmp_path, 1)
    assert names(tmp_path) == {"step_1"}


@pytest.mark.parametrize("trouble", ["version", "disk"])
def test_a_checkpoint_that_may_be_whole_is_not_set_aside(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    if trouble == "version":
        monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)  # as after an upgrade
        with pytest.raises(HarnessError, match="format version 2; this is version 99"):
            checkpoint.last_good(tmp_path)
    else:

        def fails(*_: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(checkpoint, "hex_digest", fails)  # a disk that answers again to-morrow
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.last_good(tmp_path)
    assert names(tmp_path) == {"step_1"}


def test_weights_of_another_network_are_explained() -> None:
    with pytest.raises(HarnessError) as caught:
        checkpoint.load_weights(nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, Path("step_1"))
    assert "step_1: a checkpoint of another network: " in str(caught.value)
    for text in ('Missing key(s) in state_dict: "bias"', 'Unexpected key(s) in state_dict: "extra"', "size mismatch"):
        assert text in str(caught.value)


def test_training_continues_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_is_free, real = threading.Event(), checkpoint._write_synced

    def slow(path: Path, content: bytes) -> None:
        assert disk_is_free.wait(30)
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write_synced", slow)  # a disk that takes as long as the test wants
    one = checkpointer(tmp_path, keep_last=1)
    before = one.step.unwrapped_model.state_dict()["0.weight"].clone()
    one.save(Progress(step=1))
    assert checkpoint.list_checkpoints(tmp_path) == []
    train_step(one, 1)  # the checkpoint is of the step before
    disk_is_free.set()
    one.wait()
    assert torch.equal(checkpoint.load(tmp_path / "step_1").model["0.weight"], before)
    write(tmp_path, 2, by=one)
    assert names(tmp_path) == {"step_2"}


def test_a_directory_that_another_process_took_over_is_not_written_to(tmp_path: Path) -> None:
    """Noticed when a checkpoint is asked for, and at the latest just before it is put in place."""
    looks = iter([False, True, True])

    def check_lock() -> None:
        if next(looks):
            raise HarnessError("taken over")

    one = checkpointer(tmp_path)
    one.check_lock = check_lock
    one.save(Progress(step=1))
    with pytest.raises(HarnessError, match="taken over"):
        one.wait()
    with pytest.raises(HarnessError, match="taken over"):
        one.save(Progress(step=2))
    one.close()
    assert list(tmp_path.iterdir()) == []
