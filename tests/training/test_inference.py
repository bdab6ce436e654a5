"""What a finished run says of images, and that it is kept only for the checkpoint it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.errors import HarnessError
from harness.files import hex_digest
from harness.training.inference import FOLDER, open_finished_run, predict_test_split
from tests.training.conftest import Capsys, Train, result


def test_eval_and_predict_agree_with_the_run(train: Train, tmp_path: Path, capsys: Capsys) -> None:
    run = train("run", "training.epochs=4", "ema.decay=0.8", "evaluation.recalibrate_batch_norm_batches=2")
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"] == {k: result(run)[k] for k in ("loss", "accuracy", "correct", "total")}
    assert found["test_ema"] == result(run)["ema"]
    assert main(["eval", str(run), "--checkpoint", "best"]) == 0
    best = result(run)["best"]
    said = f"test: accuracy {best['correct']}/{best['total']} ({best['accuracy']:.2%}), loss "
    assert said in capsys.readouterr().out
    assert main(["eval", str(run), "--checkpoint", "step_99"]) == 2
    capsys.readouterr()
    assert main(["eval", str(run), "--recalibrate", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["loss"] != found["test"]["loss"]  # of 1 batch, not of 2

    picture = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), (200, 30, 30)).save(picture)
    assert main(["predict", str(run), str(picture), "--json", "--top", "9", "--weights", "ema"]) == 0
    classes = json.loads(capsys.readouterr().out)[0]["classes"]
    assert len(classes) == 4
    assert sum(classes.values()) == pytest.approx(1, abs=1e-5)
    assert list(classes.values()) == sorted(classes.values(), reverse=True)
    (tmp_path / "no.png").write_text("no picture")
    assert main(["predict", str(run), str(picture), str(tmp_path / "no.png"), str(tmp_path / "missing.png")]) == 2
    error = capsys.readouterr().err
    assert "no.png" in error
    assert "missing.png" in error


def test_predictions_are_those_of_the_evaluation(train: Train) -> None:
    run = train("run", "training.epochs=2", "ema.decay=0.5")
    opened = open_finished_run(run)
    images = opened.normalised(opened.data.split("test").images_BHWC[:])
    for weights, score in (("raw", result(run)), ("ema", result(run)["ema"])):
        found = predict_test_split(run, which="last", weights=weights)
        assert found.logits_NK.shape == (score["total"], 4)
        assert int(found.correct_N.sum()) == score["correct"]
        loss = torch.nn.functional.cross_entropy(found.logits_NK, found.labels_N).item()
        assert loss == pytest.approx(score["loss"], rel=1e-5)
        torch.testing.assert_close(found.probabilities_NK.sum(1), torch.ones(score["total"]))
        with torch.no_grad():
            torch.testing.assert_close(opened.network(weights)(images), found.logits_NK, rtol=1e-4, atol=1e-4)


def test_predictions_are_kept_and_made_again_for_another_checkpoint(train: Train) -> None:
    run = train("run", "training.epochs=1")
    first = predict_test_split(run, which="last")
    file = run / FOLDER / f"{first.checkpoint.name}_raw.safetensors"
    tensors = load_file(file)
    with pytest.raises(HarnessError, match="no averaged weights"):
        predict_test_split(run, which="last", weights="ema")

    marked = {**tensors, "logits": tensors["logits"] + 1}
    save_file(marked, file, metadata={"checkpoint_sha256": hex_digest(first.checkpoint / "manifest.json")})
    assert torch.equal(predict_test_split(run, which="last").logits_NK, marked["logits"])  # taken, not made
    for metadata in ({"checkpoint_sha256": "of another one"}, None):
        save_file(marked, file, metadata=metadata)
        assert torch.equal(predict_test_split(run, which="last").logits_NK, first.logits_NK)
    file.write_bytes(b"broken")
    assert torch.equal(predict_test_split(run, which="last").logits_NK, first.logits_NK)
    assert torch.equal(load_file(file)["logits"], first.logits_NK)  # and kept again

    train("run", "training.epochs=2", resume="auto")  # the folder is no checkpoint and no obstacle
    assert result(run)["epoch"] == 2


def test_of_other_images_nothing_is_kept(train: Train, capsys: Capsys) -> None:
    run = train("run", "training.epochs=1")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("test_images: 37", "test_images: 36"))
    assert len(predict_test_split(run, which="last").labels_N) == 36
    assert not (run / FOLDER).exists()
    assert "not the images" in capsys.readouterr().err


def test_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no run with checkpoints"):
        predict_test_split(tmp_path, which="last")
