"""Recipes: every error at once, with its place; inheritance; overrides; what is written can be read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness.data.prepare import prepare
from harness.errors import HarnessError, ManyErrors
from harness.launch.local import KNOWN_IMAGES
from harness.recipe import Recipe, load
from harness.recipe import document as yaml_document
from harness.recipe.explaining import CALLED_ELSEWHERE, keys_of
from harness.recipe.loading import differences, fingerprint, json_schema, resolved_yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = "training: {epochs: 1}\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def errors_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(HarnessError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    error = caught.value
    return [e.render() for e in error.errors] if isinstance(error, ManyErrors) else [error.render()]


def test_each_recipe_loads_reads_back_and_fits_the_json_schema(tmp_path: Path) -> None:
    assert {path.name for path in RECIPES} >= {"debug.yaml", "quickstart.yaml", "seed.yaml"}
    for path in RECIPES:
        recipe = load(path)
        assert recipe.name == path.stem
        again = load(write(tmp_path, resolved_yaml(recipe)))
        assert again == recipe
        assert fingerprint(again) == fingerprint(recipe)
        jsonschema.validate(yaml_document.read(path).data, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"training": {"epcohs": 1}}, json_schema())


def test_the_seed_is_the_seed() -> None:
    recipe = load(ROOT / "recipes" / "seed.yaml")
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.momentum) == ("sgd", 0.008, 0.95)
    assert (recipe.optimizer.nesterov, recipe.optimizer.weight_decay) == (False, 0.0)
    assert (recipe.training.epochs, recipe.training.global_batch_size, recipe.training.drop_last) == (50, 128, False)
    assert (recipe.schedule.name, recipe.training.label_smoothing) == ("constant", 0)
    assert recipe.data.mean == recipe.data.std == (0.5, 0.5, 0.5)
    assert (recipe.data.flip, recipe.data.crop_padding_px, recipe.data.cutout_size_px) == ("none", 0, 0)
    assert (recipe.model.name, recipe.model.args) == ("dual_branch_seed", {})


def test_what_is_said_of_the_digits_is_so(empty_cache: Path) -> None:
    counts = prepare("digits").manifest.counts
    said = (ROOT / "recipes" / "quickstart.yaml").read_text().splitlines()[0]
    assert f"{counts['train']:,} to train and {counts['test']} to test" in said
    assert KNOWN_IMAGES["digits"] == counts["train"]


def test_all_errors_come_at_once_with_their_places(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "training:\n  epcohs: 3\n  epochs: -2\n  global_batch_size: '128'\n  precision: bf61\n"
        "optimizer: {lr: 0, momentum: .nan}\noptimizer: 3\n"
        "model:\n  args: {widhts: [[3]], merge: summ}\n",
    )
    found = "\n".join(errors_of(path, "data.flipp=none", "junk"))
    for line, text in (
        (2, 'unknown key "training.epcohs"\n  HINT: Did you mean "training.epochs"?'),
        (3, "training.epochs: must be ≥ 0, got -2"),
        (4, "training.global_batch_size: must be a number, not a text, got '128'"),
        (5, "training.precision: 'bf61' is not one of its values\n  HINT: Did you mean \"bf16\"?"),
        (6, "optimizer.lr: must be > 0"),
        (6, "optimizer.momentum: input should be a finite number"),
        (7, 'duplicate key "optimizer"'),
        (9, 'unknown key "model.args.widhts"\n  HINT: Did you mean "model.args.widths"?'),
        (9, "model.args.merge: 'summ' is not one of its values\n  HINT: Did you mean \"sum\"?"),
    ):
        assert f"{path}:{line}: {text}" in found
    assert 'override "data.flipp=none": unknown key "data.flipp"\n  HINT: Did you mean "data.flip"?' in found
    assert 'override "junk": not of the form key.path=value' in found
    assert found.count("HINT:") == 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 0\n", "says no length"),
        ("training: 3\n", "training"),
        ("[1, 2]\n", "mapping"),
        ("a: b: c\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "tag"),
        ("a: !!int abc\n", "tag"),
        ("? [1, 2]\n: 3\n", "a key must be a word"),
        ("x: " + "[" * 3000 + "\n", "nested too deeply"),
        ("".join(" " * n + "a:\n" for n in range(200)), "nested too deeply"),
        ("seed: " + "9" * 5000 + "\n", "too long"),
        ("seed: 0x" + "f" * 5000 + "\n", "too long"),
        ("x: [" + "1," * 30_000 + "]\n", "no recipe"),
    ],
)
def test_bad_files_say_what_is_wrong(text: str, expected: str, tmp_path: Path) -> None:
    assert any(expected in e and "HINT:" in e for e in errors_of(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("overrides", "what", "hint"),
    [
        ("training.steps=1", "given twice (epochs 5, steps 1)", "training.epochs=null"),
        ("training.global_batch_size=10 training.gradient_accumulation_steps=3", "not divisible", "a multiple"),
        ("schedule.warmup_epochs=6", "longer than the training (5 epochs)", "Shorten"),
        ("training.epochs=null training.steps=1 schedule.warmup_steps=2", "longer than the training (1 st", "Shorten"),
        ("schedule.warmup_epochs=1 schedule.warmup_steps=1", "the warm-up is given twice", "Keep"),
        ("schedule.name=multistep", "needs milestones", "[30, 60]"),
        ("schedule.min_lr=1.0", "above the peak lr 0.1", "Lower it"),
        ("schedule.warmup_lr=0.2", "above the peak lr 0.1", "Lower it"),
        ("schedule.name=step schedule.decay_epochs=1 schedule.decay_rate=10", "would multiply", "write 0.1"),
        ("schedule.name=step schedule.decay_epochs=400", "after 400 epochs, is beyond the training", "not steps"),
        ("schedule.name=multistep schedule.milestones_epochs=[900,1800]", "after 900 epochs", "in epochs, not steps"),
        (f"schedule.name=multistep schedule.milestones_epochs=[1{'0' * 400}]", "must be ≤ 1000000000", "multistep"),
        ("data.source=parquet", "needs a path", "data.path"),
        ("data.source=digits data.path=x", "reads no files", "Leave"),
        ("data.path=''", "is no path", "data.path"),
        ("data.image_column=a", "has no columns", "data.source: parquet"),
        ("checkpoint.best_by=ema", "no averaged weights", "ema.decay"),
        ("tracking.project=team/p", "tracking.project", "W&B project"),  # W&B would take none of it
        (f"tracking.tags=[{'x' * 65}]", "tracking.tags.0: string should have at most 64", "tags: W&B tags"),
        ("name=../up", "name: string should match", "names the run"),
        ("training.epochs=true", "valid integer", "epochs"),
        ("training.epochs='5'", "must be a number, not a text, got '5'", "Write it without quotes."),
        ("data.shuffle=yes", "must be true or false, got 'yes'", "Write true or false"),
        ("data.shuffle=1", "must be true or false, got 1", "Write true or false"),
        ("tracking.tags=a", "must be a list, got 'a'", "tags"),
        ("data.mean=[0.5]", "must have at least 3 values, got [0.5]", "mean"),
        ("data.mean=[125.3,123.0,113.9]", "must be between 0 and 1", "by 255 these are [0.4914, 0.4824, 0.4467]"),
        ("data.mean=[49.1,48.2,44.6]", "must be between 0 and 1", "by 100 these are [0.491, 0.482, 0.446]"),
        ("data.mean=[0.0019,0.0018,0.0017]", "below one grey level", "times 255 these are [0.4845, 0.459, 0.4335]"),
        ("data.mean=[-0.1,0.5,0.5]", "must be between 0 and 1", "Pixels are in [0, 1]."),
        ("data.std=[63,62,67]", "must be between 0 and 1", "divided by 255 these are [0.2471, 0.2431, 0.2627]"),
        ("data.std=[0.2,0.0,0.2]", "must be > 0", "0.25 is common"),
        ("data.std=[0.00097,0.001,0.001]", "more than one grey level", "Times 255 these are [0.2474, 0.255, 0.255]"),
        ("data.crop_padding_px=32", "smaller than the image (32 px)", "data.crop_padding_px: 4"),
        ("data.cutout_size_px=32", "smaller than the image (32 px)", "data.cutout_size_px: 8"),
        ("data.workers=1000", "must be ≤ 512", "workers"),
        ("training.label_smoothing=10", "must be < 1", "If 10 % is meant, write 0.1."),
        ("mix.probability=50", "must be ≤ 1", "If 50 % is meant, write 0.5."),
        ("model.args.dropout=25", "must be < 1", "If 25 % is meant, write 0.25."),
        ("ema.decay=99.9", "must be < 1", "If 99.9 % is meant, write 0.999."),
        ("ema.decay=0.001", "must be ≥ 0.5", "share of the average that each step keeps, such as 0.999"),
        ("optimizer.lr=4 optimizer.weight_decay=0.5", "it would take 200% of the weights", "5e-4 is common"),
        ("seed=1 seed.a=2", '"seed" holds no further keys', "Shorten the key"),
    ],
)
def test_a_bad_value_is_refused_with_what_may_be_meant(tmp_path: Path, overrides: str, what: str, hint: str) -> None:
    (error,) = errors_of(write(tmp_path, "training: {epochs: 5}\n"), *overrides.split())
    assert what in error
    assert hint in error.partition("HINT: ")[2]


def test_usual_values_are_not_refused(tmp_path: Path) -> None:
    text = "training: {epochs: 5, global_batch_size: 7}\ndata: {mean: [0, 0.5, 1], std: [1, 1, 0.5]}\n"
    recipe = load(write(tmp_path, text + "ema: {decay: 0.5}\nmix: {mixup_alpha: 0.2}\n"))
    assert (recipe.data.std, recipe.training.global_batch_size) == ((1, 1, 0.5), 7)


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("epochs=2", 'unknown key "epochs"', 'Did you mean "training.epochs"?'),
        ("train_images=9", 'unknown key "train_images"', 'Did you mean "data.synthetic.train_images"?'),
        (
            "batch_size=32",
            'unknown key "batch_size"',
            'Did you mean "training.global_batch_size" or "evaluation.per_device_batch_size"?',
        ),
        ("optimizer.learning_rate=0.1", 'unknown key "optimizer.learning_rate"', 'Did you mean "optimizer.lr"?'),
        ("dataset=cifar10", 'unknown key "dataset"', 'Did you mean "data.source"?'),
        ("dataset={source: cifar10}", 'unknown key "dataset"', 'Did you mean "data"?'),
        ("data.num_workers=2", 'unknown key "data.num_workers"', 'Did you mean "data.workers"?'),
        ("training.lr=0.1", 'unknown key "training.lr"', 'Did you mean "optimizer.lr"?'),
        ("training.epoch=2", 'unknown key "training.epoch"', 'Did you mean "training.epochs"?'),
        ("optimizer.rl=2", 'unknown key "optimizer.rl"', 'Did you mean "optimizer.lr"?'),
        (
            "training.epochs\u00a0=3",
            'unknown key "training.epochs\u00a0"',
            'Did you mean "training.epochs"? The given name has U+00A0 NO-BREAK SPACE.',
        ),
        (
            "model=resnet18",
            "model: must be a section of keys, got 'resnet18'",
            "Write model.name=resnet18, or in a file model: {name: resnet18}.",
        ),
        ("ema=3", "ema: must be a section of keys, got 3", "ema is a section with the keys decay, warmup."),
    ],
)
def test_a_key_by_another_name_is_explained_in_full(tmp_path: Path, override: str, what: str, hint: str) -> None:
    assert errors_of(write(tmp_path, MINIMAL), override) == [f'override "{override}": {what}\n  HINT: {hint}']


def test_the_names_of_other_tools_lead_to_keys_that_there_are() -> None:
    keys = {".".join(key) for key in keys_of(Recipe)}
    assert not set(CALLED_ELSEWHERE.values()) - keys
    assert not set(CALLED_ELSEWHERE) & {key.split(".")[-1] for key in keys}


def test_what_cannot_be_read_names_its_neighbours_and_nothing_hidden(tmp_path: Path) -> None:
    assert 'Did you mean "seed.yaml"?' in errors_of(ROOT / "recipes" / "sead.yaml")[0]
    write(tmp_path, "seed: 0\n", ".hidden.yaml")
    assert errors_of(tmp_path / "nope.yaml")[0].endswith("HINT: Check the path.")
    write(tmp_path, "seed: 0\n", "a.yaml")
    write(tmp_path, "seed: 0\n", "b.yaml")
    assert errors_of(tmp_path)[0].endswith(f"HINT: Give a file in {tmp_path}. Valid names: a.yaml, b.yaml.")
    assert errors_of(tmp_path / "other_name")[0].endswith(f"HINT: In {tmp_path}: Valid names: a.yaml, b.yaml.")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in errors_of(tmp_path / "bytes.yaml")[0]


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is not a file" in errors_of(tmp_path / "pipe.yaml")[0]
    assert "is not a file" in errors_of(write(tmp_path, "base: /dev/zero\n"))[0]


def test_a_recipe_comes_through_a_pipe_or_an_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"base: seed\nseed: 7\n")
    os.close(writing)
    recipe = load(f"/dev/fd/{reading}")
    assert (recipe.name, recipe.seed, recipe.optimizer.lr) == ("stdin", 7, 0.008)
    write(tmp_path, MINIMAL, "a.yaml")
    monkeypatch.chdir(tmp_path)
    with write(tmp_path, "base: a.yaml\n").open() as file:
        recipe = load(f"/dev/fd/{file.fileno()}")  # what it inherits is looked for here, not in /dev/fd
    assert (recipe.name, recipe.training.epochs) == ("stdin", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several ranks cannot read one pipe" in errors_of(Path(f"/dev/fd/{reading}"))[0]
    os.close(reading)


def test_packaged_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("seed") == load(ROOT / "recipes" / "seed.yaml")
    assert load(write(tmp_path, "base: quickstart\n")).data.source == "digits"
    (error,) = errors_of(Path("quikstart"))
    assert 'Did you mean "quickstart"? `harness recipe list`' in error
    (tmp_path / "seed").write_text("training: {epochs: 9}\n")  # a file comes first
    assert load("seed").training.epochs == 9


def test_a_long_override_is_answered_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    begin = time.monotonic()
    for override in ("a=" + "[" * 10_000, ".".join("a" * 3000) + "=1", "model.args.a=" + "{b: " * 3000):
        assert "nested too deeply" in errors_of(path, override)[0]
    assert time.monotonic() - begin < 5


def test_base_is_merged_key_by_key_and_overrides_come_last(tmp_path: Path) -> None:
    write(tmp_path, "seed: 3\ntraining: {epochs: 5, global_batch_size: 64}\noptimizer: {lr: 0.5}\n", "a.yaml")
    write(tmp_path, "base: a.yaml\ntraining: {global_batch_size: 32}\n", "b.yaml")
    path = write(tmp_path, "base: b.yaml\ntraining: {epochs: 7}\n", "c.yaml")
    recipe = load(path, ["optimizer.lr=1e-3", "tracking.tags=[a, b]", "training.precision=no"])
    assert (recipe.name, recipe.seed, recipe.optimizer.lr) == ("c", 3, 0.001)
    assert (recipe.training.epochs, recipe.training.global_batch_size) == (7, 32)
    assert recipe.tracking.tags == ("a", "b")
    assert recipe.training.precision == "no"  # YAML 1.1 would read a boolean here


ARGS = {"model": ("dual_branch", "resnet18", "merge", "concat"), "optimizer": ("adamw", "lion", "eps", 0.1)}


@pytest.mark.parametrize("section", ARGS)
def test_args_are_inherited_as_long_as_the_name_stays(section: str, tmp_path: Path) -> None:
    name, other_name, key, value = ARGS[section]
    args = {key: value}
    write(tmp_path, f"{MINIMAL}{section}: {{name: {name}, args: {args}}}\n", "a.yaml")

    def args_of(text: str, *overrides: str) -> dict[str, object]:
        return getattr(load(write(tmp_path, f"base: a.yaml\n{text}"), overrides), section).args

    more = {"head_width": 3} if section == "model" else {"foreach": False}
    assert args_of("") == args
    assert args_of(f"{section}: {{name: {name}}}\n") == args
    assert args_of(f"{section}: {{args: {more}}}\n") == args | more
    assert args_of(f"{section}: {{name: {other_name}}}\n") == {}
    assert args_of(f"{section}: {{name: {other_name}, args: {{x: 1}}}}\n") == {"x": 1}
    assert args_of("", f"{section}.name={name}") == args
    assert args_of("", f"{section}.name={other_name}") == {}
    # What the command line gives is not inherited, whatever its order.
    assert args_of("", f"{section}.args.x=1", f"{section}.name={other_name}") == {"x": 1}
    assert args_of("", f"{section}={{name: {other_name}, args: {{x: 1}}}}") == {"x": 1}


def test_args_of_the_default_network_go_with_it(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "model: {args: {merge: concat}}\n", "a.yaml")
    assert load(write(tmp_path, "base: a.yaml\nmodel: {name: resnet18}\n")).model.args == {}
    assert load(write(tmp_path, "base: a.yaml\nmodel: {name: dual_branch_seed}\n")).model.args == {"merge": "concat"}


def test_an_override_replaces_args_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "model: {args: {merge: concat, head_width: 8}}\n")
    assert load(path, ["model.args={}"]).model.args == {}
    both = load(path, ["model.args={dropout: 0.5}", "model.args.head_width=4"])
    assert both.model.args == {"dropout": 0.5, "head_width": 4}
    assert load(path, ["model.args.head_width=4"]).model.args == {"merge": "concat", "head_width": 4}
    assert load(path, ["data.synthetic={train_images: 5}"]).data.synthetic.test_images == 256  # others are merged


def test_errors_of_and_in_a_base_are_placed(tmp_path: Path) -> None:
    write(tmp_path, "training: {epochs: 5,\n  global_batch_size: 0}\n", "bad.yaml")
    assert f"{tmp_path / 'bad.yaml'}:2: training.global_batch_size" in errors_of(write(tmp_path, "base: bad.yaml\n"))[0]
    path = write(tmp_path, "seed: 1\nbase: nowhere.yaml\n")
    assert f"{path}:2: base: " in errors_of(path)[0]
    assert f"{path}:1: base must be the path" in errors_of(write(tmp_path, "base: 3\n"))[0]
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "seed: 1\nbase: a.yaml\n", "b.yaml")
    message = errors_of(tmp_path / "a.yaml")[0]
    assert f"{tmp_path / 'b.yaml'}:2: inheritance cycle: a.yaml → b.yaml → a.yaml" in message


def test_recipe_is_frozen_and_differences_are_named(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    other = load(write(tmp_path, MINIMAL), ["seed=4"])
    assert differences(recipe, other) == {"seed": (0, 4)}
    assert fingerprint(recipe) != fingerprint(other)


def test_every_key_has_a_description() -> None:
    whole = Recipe.model_json_schema()
    fields = {k: f for part in (whole, *whole["$defs"].values()) for k, f in part["properties"].items()}
    assert len(fields) > 50
    assert [name for name, field in fields.items() if "$ref" not in field and not field.get("description")] == []


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
sections = st.sampled_from([*Recipe.model_fields, "base", "trainign"])
keys = st.sampled_from(sorted({key[-1] for key in keys_of(Recipe) if len(key) > 1}))


@given(st.dictionaries(sections, plain | st.dictionaries(keys, plain, max_size=4), max_size=5))
def test_generated_recipes_load_or_explain(tmp_path: Path, data: dict[str, object]) -> None:
    data["base"] = None  # files are another test's matter
    path = write(tmp_path, yaml.safe_dump(data, allow_unicode=True))
    try:
        recipe = load(path)
    except HarnessError as error:
        assert error.exit_code == 2
        assert str(error)
    else:
        assert load(write(tmp_path, resolved_yaml(recipe), "again.yaml")) == recipe


@given(st.text(max_size=80) | st.text(alphabet="{}[]:,-&*!?|>'\"%@` \n\tab1.e", max_size=60))
def test_any_text_explains(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(HarnessError):
        load(path)  # no text this short says how long to train


@given(st.text(max_size=40) | st.builds("{}.{}={}".format, sections, keys, st.text(max_size=10)))
def test_any_override_loads_or_explains(override: str) -> None:
    try:
        recipe = load(ROOT / "recipes" / "debug.yaml", [override])
    except HarnessError as error:
        assert error.exit_code == 2
    else:
        assert isinstance(recipe, Recipe)


@given(plain)
def test_dumped_values_are_read_back(value: object) -> None:
    text = yaml_document.dump({"value": value})
    assert repr(yaml_document.parse(text, "text").data["value"]) == repr(value)
