"""Recipes: every error at once, with its place; inheritance; overrides; what is written can be read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.data.prepare import prepare
from harness.errors import HarnessError, ManyErrors
from harness.launch.local import KNOWN_IMAGES
from harness.recipe import Recipe, explaining, load
from harness.recipe import document as yaml_document
from harness.recipe.explaining import CALLED_ELSEWHERE
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


def test_the_folder_has_its_recipes() -> None:
    assert {p.name for p in RECIPES} >= {"debug.yaml", "quickstart.yaml", "seed.yaml"}
    assert len(RECIPES) >= 3  # each of them is loaded below


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_each_recipe_loads_and_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    again = load(write(tmp_path, resolved_yaml(recipe)))
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_json_schema_agrees_with_the_recipes(path: Path) -> None:
    jsonschema.validate(yaml_document.read(path).data, json_schema())


def test_json_schema_refuses_an_unknown_key() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"training": {"epcohs": 1}}, json_schema())


def test_the_seed_is_the_seed() -> None:
    recipe = load(ROOT / "recipes" / "seed.yaml")
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.momentum) == ("sgd", 0.008, 0.95)
    assert (recipe.optimizer.nesterov, recipe.optimizer.weight_decay) == (False, 0.0)
    assert (recipe.training.epochs, recipe.training.global_batch_size, recipe.training.drop_last) == (50, 128, False)
    assert recipe.schedule.name == "constant"
    assert recipe.data.mean == recipe.data.std == (0.5, 0.5, 0.5)
    assert (recipe.data.flip, recipe.data.crop_padding_px, recipe.data.cutout_size_px) == ("none", 0, 0)
    assert recipe.model.name == "dual_branch_seed"
    assert recipe.model.args == {}
    assert recipe.training.label_smoothing == 0


def test_what_is_said_of_the_digits_is_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
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
        ("training: {epochs: 1, steps: 1}\n", "given twice"),
        ("training: {epochs: 1, global_batch_size: 10, gradient_accumulation_steps: 3}\n", "not divisible"),
        ("training: {epochs: 1}\nschedule: {warmup_epochs: 2}\n", "longer than the training"),
        ("training: {steps: 1}\nschedule: {warmup_steps: 2}\n", "longer than the training"),
        ("training: {epochs: 1}\nschedule: {warmup_steps: 1, warmup_epochs: 1}\n", "given twice"),
        ("training: {epochs: 1}\nschedule: {name: multistep}\n", "needs milestones"),
        ("training: {epochs: 1}\nschedule: {min_lr: 1.0}\n", "above the peak"),
        ("training: {epochs: 1}\ndata: {source: parquet}\n", "needs a path"),
        ("training: {epochs: 1}\ndata: {source: digits, path: x}\n", "reads no files"),
        ("training: {epochs: 1}\ncheckpoint: {best_by: ema}\n", "no averaged weights"),
        ("training: {epochs: 1}\ntracking: {project: team/p}\n", "tracking.project"),  # W&B would take none of it
        (
            f"training: {{epochs: 1}}\ntracking: {{tags: [{'x' * 65}]}}\n",
            "tracking.tags.0: string should have at most 64",
        ),
        ("training: {epochs: true}\n", "valid integer"),
        ("training: {epochs: 1}\ndata: {shuffle: yes}\n", "must be true or false, got 'yes'\n  HINT: Write true or"),
        ("training: {epochs: 1}\ndata: {shuffle: 1}\n", "must be true or false, got 1"),
        ("training: {epochs: '5'}\n", "must be a number, not a text, got '5'\n  HINT: Write it without quotes."),
        ("training: {epochs: 1}\ntracking: {tags: a}\n", "must be a list, got 'a'"),
        ("training: {epochs: 1}\ndata: {mean: [0.5]}\n", "must have at least 3 values, got [0.5]"),
        ("training: 3\n", "training"),
        ("name: ../up\ntraining: {epochs: 1}\n", "name"),
        ("[1, 2]\n", "mapping"),
        ("a: b: c\n", "not valid YAML"),
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "tag"),
        ("? [1, 2]\n: 3\n", "a key must be a word"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("x: " + "[" * 3000 + "\n", "ested too deeply"),
        ("seed: " + "9" * 5000 + "\n", "too long"),
        ("seed: 0x" + "f" * 5000 + "\n", "too long"),
        ("x: [" + "1," * 30_000 + "]\n", "no recipe"),
        ("".join(" " * n + "a:\n" for n in range(200)), "ested too deeply"),
    ],
)
def test_bad_recipes_say_what_is_wrong(text: str, expected: str, tmp_path: Path) -> None:
    assert any(expected in e and "HINT:" in e for e in errors_of(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("overrides", "what", "hint"),
    [
        (
            "data.mean=[125.3,123.0,113.9]",
            "must be between 0 and 1",
            "divided by 255 these are [0.4914, 0.4824, 0.4467]",
        ),
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
        ("optimizer.momentum=90", "must be < 1", "If 90 % is meant, write 0.9."),
        ("model.args.dropout=25", "must be < 1", "If 25 % is meant, write 0.25."),
        ("ema.decay=99.9", "must be < 1", "If 99.9 % is meant, write 0.999."),
        ("ema.decay=0.001", "must be ≥ 0.5", "write 0.999"),
        ("optimizer.lr=4 optimizer.weight_decay=0.5", "it would take 200% of the weights", "5e-4 is common"),
        ("schedule.warmup_lr=0.2", "above the peak lr 0.1", "Lower it"),
        ("schedule.name=step schedule.decay_epochs=1 schedule.decay_rate=10", "would multiply", "write 0.1"),
        (
            "schedule.name=step schedule.decay_epochs=400",
            "after 400 epochs, is beyond the training",
            "in epochs, not steps",
        ),
        ("schedule.name=multistep schedule.milestones_epochs=[900,1800]", "after 900 epochs", "in epochs, not steps"),
    ],
)
def test_values_of_another_unit_are_refused(tmp_path: Path, overrides: str, what: str, hint: str) -> None:
    (error,) = errors_of(write(tmp_path, "training: {epochs: 5}\n"), *overrides.split())
    assert what in error
    assert hint in error


def test_usual_values_are_not(tmp_path: Path) -> None:
    text = "training: {epochs: 5}\ndata: {mean: [0, 0.5, 1], std: [1, 1, 0.5]}\nema: {decay: 0.5}\n"
    assert load(write(tmp_path, text)).data.std == (1, 1, 0.5)


def test_keys_that_look_alike_say_so(tmp_path: Path) -> None:
    for key, told in (
        ("training.epochs\u00a0", "NO-BREAK SPACE"),
        ("training.epo\u0441hs", "CYRILLIC SMALL LETTER ES"),
    ):
        (error,) = errors_of(write(tmp_path, MINIMAL), f"{key}=3")
        assert 'Did you mean "training.epochs"? The given name has U+' in error
        assert told in error


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("epochs=2", 'unknown key "epochs"', 'Did you mean "training.epochs"?'),
        ("lr=0.1", 'unknown key "lr"', 'Did you mean "optimizer.lr"?'),
        ("train_images=9", 'unknown key "train_images"', 'Did you mean "data.synthetic.train_images"?'),
        (
            "batch_size=32",
            'unknown key "batch_size"',
            'Did you mean "training.global_batch_size" or "evaluation.per_device_batch_size"?',
        ),
        ("learning_rate=0.1", 'unknown key "learning_rate"', 'Did you mean "optimizer.lr"?'),
        ("optimizer.learning_rate=0.1", 'unknown key "optimizer.learning_rate"', 'Did you mean "optimizer.lr"?'),
        ("mixup=0.2", 'unknown key "mixup"', 'Did you mean "mix.mixup_alpha"?'),
        ("dataset=cifar10", 'unknown key "dataset"', 'Did you mean "data.source"?'),
        ("dataset={source: cifar10}", 'unknown key "dataset"', 'Did you mean "data"?'),
        ("data.num_workers=2", 'unknown key "data.num_workers"', 'Did you mean "data.workers"?'),
        ("training.lr=0.1", 'unknown key "training.lr"', 'Did you mean "optimizer.lr"?'),
        ("training.epoch=2", 'unknown key "training.epoch"', 'Did you mean "training.epochs"?'),
        ("optimizer.rl=2", 'unknown key "optimizer.rl"', 'Did you mean "optimizer.lr"?'),
        (
            "model=resnet18",
            "model: must be a section of keys, got 'resnet18'",
            "Write model.name=resnet18, or in a file model: {name: resnet18}.",
        ),
        ("ema=3", "ema: must be a section of keys, got 3", "ema is a section with the keys decay, warmup."),
    ],
)
def test_a_key_without_its_section_is_told_in_full(tmp_path: Path, override: str, what: str, hint: str) -> None:
    path = write(tmp_path, "training: {epochs: 1}\n")
    assert errors_of(path, override) == [f'override "{override}": {what}\n  HINT: {hint}']


def test_the_names_of_other_tools_lead_to_keys_that_there_are() -> None:
    keys = {".".join(key) for key in explaining.keys_of(Recipe)}
    assert not set(CALLED_ELSEWHERE.values()) - keys
    assert not set(CALLED_ELSEWHERE) & {key.split(".")[-1] for key in keys}


def test_missing_file_names_its_neighbour() -> None:
    assert 'Did you mean "seed.yaml"?' in errors_of(ROOT / "recipes" / "sead.yaml")[0]


def test_a_folder_names_the_recipes_in_it_and_nothing_hidden(tmp_path: Path) -> None:
    write(tmp_path, "seed: 0\n", ".hidden.yaml")
    assert errors_of(tmp_path / "nope.yaml")[0].endswith("HINT: Check the path.")
    write(tmp_path, "seed: 0\n", "a.yaml")
    write(tmp_path, "seed: 0\n", "b.yaml")
    assert errors_of(tmp_path)[0].endswith(f"HINT: Give a file in {tmp_path}. Valid names: a.yaml, b.yaml.")
    assert errors_of(tmp_path / "other_name")[0].endswith(f"HINT: In {tmp_path}: Valid names: a.yaml, b.yaml.")


def test_folder_and_binary_files_are_errors(tmp_path: Path) -> None:
    assert "cannot be read" in errors_of(tmp_path)[0]
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in errors_of(tmp_path / "b.yaml")[0]


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is not a file" in errors_of(tmp_path / "pipe.yaml")[0]
    assert "is not a file" in errors_of(write(tmp_path, "base: /dev/zero\n"))[0]


def test_a_recipe_comes_through_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"base: seed\nseed: 7\n")
    os.close(writing)
    recipe = load(f"/dev/fd/{reading}")
    assert (recipe.name, recipe.seed, recipe.optimizer.lr) == ("stdin", 7, 0.008)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several ranks cannot read one pipe" in errors_of(Path(f"/dev/fd/{reading}"))[0]
    os.close(reading)


def test_an_open_file_is_read_like_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, MINIMAL, "a.yaml")
    monkeypatch.chdir(tmp_path)
    with write(tmp_path, "base: a.yaml\n").open() as file:
        recipe = load(f"/dev/fd/{file.fileno()}")  # what it inherits is looked for here, not in /dev/fd
    assert (recipe.name, recipe.training.epochs) == ("stdin", 1)


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
        assert "ested too deeply" in errors_of(path, override)[0]
    assert time.monotonic() - begin < 5


def test_base_is_merged_key_by_key_and_overrides_come_last(tmp_path: Path) -> None:
    write(tmp_path, "seed: 3\ntraining: {epochs: 5, global_batch_size: 64}\noptimizer: {lr: 0.5}\n", "a.yaml")
    write(tmp_path, "base: a.yaml\ntraining: {global_batch_size: 32}\n", "b.yaml")
    path = write(tmp_path, "base: b.yaml\ntraining: {epochs: 7}\n", "c.yaml")
    recipe = load(path, ["optimizer.lr=1e-3", "tracking.tags=[a, b]", "training.precision=no"])
    assert recipe.name == "c"
    assert (recipe.seed, recipe.training.epochs, recipe.training.global_batch_size) == (3, 7, 32)
    assert recipe.optimizer.lr == 0.001
    assert recipe.tracking.tags == ("a", "b")
    assert recipe.training.precision == "no"  # YAML 1.1 would read a boolean here


def test_mixing_takes_odd_batches(tmp_path: Path) -> None:
    text = "training: {epochs: 1, global_batch_size: 7}\nmix: {mixup_alpha: 0.2}\n"
    assert load(write(tmp_path, text)).training.global_batch_size == 7


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
    assert load(path, ["model.args={dropout: 0.5}", "model.args.head_width=4"]).model.args == {
        "dropout": 0.5,
        "head_width": 4,
    }
    assert load(path, ["model.args.head_width=4"]).model.args == {"merge": "concat", "head_width": 4}
    assert load(path, ["data.synthetic={train_images: 5}"]).data.synthetic.test_images == 256  # others are merged


def test_error_in_a_base_is_placed_in_the_base(tmp_path: Path) -> None:
    write(tmp_path, "training: {epochs: 5,\n  global_batch_size: 0}\n", "a.yaml")
    path = write(tmp_path, "base: a.yaml\n")
    assert f"{tmp_path / 'a.yaml'}:2: training.global_batch_size" in errors_of(path)[0]


def test_inheritance_cycle_and_missing_base(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "seed: 1\nbase: a.yaml\n", "b.yaml")
    message = errors_of(tmp_path / "a.yaml")[0]
    assert f"{tmp_path / 'b.yaml'}:2: inheritance cycle: a.yaml → b.yaml → a.yaml" in message
    path = write(tmp_path, "base: nowhere.yaml\n")
    assert f"{path}:1: base: " in errors_of(path)[0]


def test_recipe_is_frozen_and_differences_are_named(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    other = load(write(tmp_path, MINIMAL), ["seed=4"])
    assert differences(recipe, other) == {"seed": (0, 4)}
    assert fingerprint(recipe) != fingerprint(other)


def test_every_key_has_a_description() -> None:
    def check(schema: dict[str, object]) -> int:
        count = 0
        for name, field in schema["properties"].items():  # type: ignore[attr-defined]
            if "$ref" not in field:
                assert field.get("description"), name
                count += 1
        return count

    whole = Recipe.model_json_schema()
    assert sum(check(part) for part in [whole, *whole["$defs"].values()]) > 50


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
sections = st.sampled_from([*Recipe.model_fields, "base", "trainign"])
keys = st.sampled_from(
    sorted({k for f in Recipe.model_fields.values() for k in getattr(f.annotation, "model_fields", {})})
)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80) | st.text(alphabet="{}[]:,-&*!?|>'\"%@` \n\tab1.e", max_size=60))
def test_any_text_loads_or_explains(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(HarnessError):
        load(path)  # no text this short says how long to train


@settings(max_examples=1000, deadline=None)
@given(st.text(max_size=40) | st.builds("{}.{}={}".format, sections, keys, st.text(max_size=10)))
def test_any_override_loads_or_explains(override: str) -> None:
    try:
        recipe = load(ROOT / "recipes" / "debug.yaml", [override])
    except HarnessError as error:
        assert error.exit_code == 2
    else:
        assert isinstance(recipe, Recipe)


@settings(max_examples=500, deadline=None)
@given(plain)
def test_dumped_values_are_read_back(value: object) -> None:
    def same(a: object, b: object) -> bool:
        return repr(a) == repr(b)

    text = yaml_document.dump({"value": value})
    assert same(yaml_document.parse(text, "text").data["value"], value)
    assert same(yaml_document.load_plain(text)["value"], value)
