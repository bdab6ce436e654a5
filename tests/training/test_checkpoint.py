"""Checkpoints come back to the bit, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from harness.errors import HarnessError
from harness.training import checkpoint, optimizer_state
from harness.training.optim import build_optimizer
from tests.training.states import whole_state


def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(
        model, name=name, lr=0.01, momentum=0.9, nesterov=False, weight_decay=0.01, decay_norm_and_bias=False, args={}
    )
    step(model, optimizer, 0)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    optimizer.zero_grad()


def write(folder: Path, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    saved = checkpoint.snapshot(
        number,
        model=model.state_dict(),
        ema=None,
        optimizer=optimizer.state_dict(),
        state=whole_state(number),
    )
    return checkpoint.write(folder, saved)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "lamb"])
def test_training_goes_on_bit_equal_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    model, optimizer = trained(name)
    saved = checkpoint.load(write(tmp_path, 1, model, optimizer))
    other, other_optimizer = trained(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    checkpoint.load_weights(other, saved.model, saved.path)
    optimizer_state.load(other_optimizer, saved.optimizer, saved.state["optimizer"], saved.path)
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    path = write(tmp_path, 1, *trained("adamw"))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1  # the user's umask, for all files alike


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    model, optimizer = trained("sgd")
    paths = [write(tmp_path, n, model, optimizer) for n in (1, 2, 9, 10, 11)]
    (tmp_path / ".step_12.999.tmp").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, keep=paths[1])
    assert {p.name for p in tmp_path.iterdir()} == {"step_2", "step_10", "step_11"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "step_1"
    if not path.exists():
        write(tmp_path, 1, *trained("sgd"))
    file = path / data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        file.write_bytes(whole[:at])
    else:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :])
    try:
        saved = checkpoint.load(path)
        assert file.name == "manifest.json"  # spacing, or the step's number there: nothing a load relies on
        assert saved.state["progress"]["step"] == 1
    except HarnessError as error:
        assert error.exit_code == 2
        assert "HINT" in str(error)
    finally:
        file.write_bytes(whole)


def test_missing_file_and_missing_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 7, *trained("sgd"))
    with pytest.raises(HarnessError, match='Did you mean "step_7"'):
        checkpoint.load(path.with_name("step_8"))
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(HarnessError, match=r"optimizer\.safetensors is missing"):
        checkpoint.load(path)


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, 1, *trained("sgd"))
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files": {', '"files": {"../x": {"sha256": "", "bytes": 0},'))
    (tmp_path / "x").write_text("")
    with pytest.raises(HarnessError, match="is missing"):
        checkpoint.load(path)


def test_an_existing_checkpoint_survives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained("sgd")
    path = write(tmp_path, 1, model, optimizer)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)  # a full disk, without filling one
    with pytest.raises(HarnessError, match="No space left") as caught:
        write(tmp_path, 2, model, optimizer)
    assert caught.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    checkpoint.load(path)


def test_a_checkpoint_whose_successor_did_not_come_is_put_back(tmp_path: Path) -> None:
    path = write(tmp_path, 1, *trained("sgd"))
    path.rename(tmp_path / ".step_1.replaced")  # as after a kill between the two renames
    assert checkpoint.last_good(tmp_path) == (path, [])
    write(tmp_path, 1, *trained("sgd"))
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize("trouble", ["version", "disk"])
def test_a_checkpoint_that_may_be_whole_is_not_set_aside(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 1, *trained("sgd"))
    if trouble == "version":
        monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)  # as after an upgrade
        with pytest.raises(HarnessError, match="format version 2; this is version 99"):
            checkpoint.last_good(tmp_path)
    else:

        def fails(*_: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(checkpoint, "_sha256", fails)  # a disk that answers again to-morrow
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.last_good(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_weights_of_another_network_are_explained() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(HarnessError) as caught:
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, Path("step_1"))
    for text in ('"bias" is missing', '"extra" is not in the network', '"weight" has shape (2, 4), not (2, 3)'):
        assert text in str(caught.value)
