"""What a checkpoint says of each test image, and that it is kept only for the checkpoint it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.errors import HarnessError
from harness.training.predictions import FOLDER, predict_test_split
from tests.training.conftest import Train, result


def test_predictions_are_those_of_the_evaluation(train: Train) -> None:
    run = train("run", "training.epochs=2", "ema.decay=0.5")
    for weights, score in (("raw", result(run)), ("ema", result(run)["ema"])):
        found = predict_test_split(run, which="last", weights=weights)
        assert found.logits_NK.shape == (score["total"], 4)
        assert int(found.correct_N.sum()) == score["correct"]
        loss = torch.nn.functional.cross_entropy(found.logits_NK, found.labels_N).item()
        assert loss == pytest.approx(score["loss"], rel=1e-5)
        torch.testing.assert_close(found.probabilities_NK.sum(1), torch.ones(score["total"]))


def test_eval_writes_an_accuracy_as_training_does(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=1")
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    score = result(run)
    assert (
        f"test: accuracy {score['correct']}/{score['total']} ({score['accuracy']:.2%}), loss "
        in capsys.readouterr().out
    )


def test_they_are_kept_and_made_anew_for_another_checkpoint(train: Train) -> None:
    run = train("run", "training.epochs=1")
    first = predict_test_split(run, which="last")
    file = run / FOLDER / f"{first.checkpoint.name}_raw.safetensors"
    tensors = load_file(file)
    with pytest.raises(HarnessError, match="no averaged weights"):
        predict_test_split(run, which="last", weights="ema")

    marked = {**tensors, "logits": tensors["logits"] + 1}
    digest = {"checkpoint_sha256": _digest(first.checkpoint)}
    save_file(marked, file, metadata=digest)
    assert torch.equal(predict_test_split(run, which="last").logits_NK, marked["logits"])  # taken, not made
    for metadata in ({"checkpoint_sha256": "of another one"}, None):
        save_file(marked, file, metadata=metadata)
        assert torch.equal(predict_test_split(run, which="last").logits_NK, first.logits_NK)
    file.write_bytes(b"broken")
    assert torch.equal(predict_test_split(run, which="last").logits_NK, first.logits_NK)
    assert torch.equal(load_file(file)["logits"], first.logits_NK)  # and kept again


def test_of_other_images_nothing_is_kept(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", "training.epochs=1")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("test_images: 37", "test_images: 36"))
    found = predict_test_split(run, which="last")
    assert len(found.labels_N) == 36
    assert not (run / FOLDER).exists()
    assert "not the images" in capsys.readouterr().err


def _digest(checkpoint: Path) -> str:
    import hashlib

    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def test_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no run with checkpoints"):
        predict_test_split(tmp_path, which="last")


def test_the_run_can_be_gone_on_with(train: Train) -> None:
    """The folder is no checkpoint and no obstacle: the run can be gone on with."""
    run = train("run", "training.epochs=1")
    predict_test_split(run, which="last")
    train("run", "training.epochs=2", resume="auto")
    assert json.loads((run / "result.json").read_text())["epoch"] == 2
