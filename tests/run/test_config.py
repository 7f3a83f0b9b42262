"""Configurations: what is wrong is named with its line, and what is given is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finegraft.errors import RecipeError
from finegraft.run.config import TuneConfig, changed_keys
from finegraft.run.config_file import load_config, parse_config

GOOD = """\
base: minilm
task: {kind: classification, text: sentence}
data:
  train: data/train.csv
  eval: data/dev.csv
method: lora
train:
  epochs: 2
  lr: 1e-3
seed: 4
out: runs/one
"""


def written(folder: Path, text: str = GOOD) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_typed_settings_and_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    assert (config.train.epochs, config.train.lr, config.train.batch_size) == (2.0, 1e-3, 32)
    assert (config.task.text, config.task.label, config.seed) == ("sentence", "label", 4)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "  epochs: 2",
            "  epochs: 2\n  bach_size: 8",
            r"line 9: unknown key 'bach_size' in train; did you mean 'batch_size'\?",
        ),
        ("seed: 4", "sede: 4", r"line 10: unknown key 'sede' at the top; did you mean 'seed'\?"),
        ("text: sentence", "txt: sentence", r"line 2: unknown key 'txt' in task; did you mean 'text'\?"),
        ("  eval: data/dev.csv", "  evaluate: data/dev.csv", "line 5: unknown key 'evaluate' in data"),
        ("  lr: 1e-3", "  lr: -1", r"line 9: train.lr: Input should be greater than 0 \(got -1\)"),
        ("seed: 4", "seed: four", "line 10: seed: .*'four'"),
        ("kind: classification", "kind: clasification", "line 2: task.kind: .*'clasification'"),
        ("method: lora", "method: {rank: 3}", "line 6: method: give a method's name"),
        ("seed: 4", "seed: 4\nseed: 5", "line 11: 'seed' is given twice"),
        ("out: runs/one\n", "", "out is missing"),
        ("  eval: data/dev.csv\n", "", "line 3: data.eval is missing"),
        ("base: minilm", "base: [", "cannot read"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, before: str, after: str, expected: str) -> None:
    assert before in GOOD
    with pytest.raises(RecipeError, match=expected):
        load_config(written(tmp_path, GOOD.replace(before, after)))


def test_every_problem_is_listed(tmp_path: Path) -> None:
    text = GOOD.replace("seed: 4", "seed: x").replace("epochs: 2", "epoch: 2")
    with pytest.raises(RecipeError, match=r"(?s)(line 8: .*line 10: |line 10: .*line 8: )"):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="no configuration"):
        load_config(written(tmp_path, text))


def test_a_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*run\.yaml"):
        load_config(tmp_path / "run.yaml")


def test_overrides_are_typed_and_the_last_one_wins(tmp_path: Path) -> None:
    overrides = ["train.epochs=1", "train.steps=7", "method.rank=16", "seed=9", "seed=10", "data.limit=null"]
    config = load_config(written(tmp_path), overrides)
    assert (config.train.epochs, config.train.steps, config.seed, config.data.limit) == (1.0, 7, 10, None)
    assert config.method == {"name": "lora", "rank": 16}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.bach_size=8", r"--set train.bach_size=8: unknown key 'bach_size' in train; did you mean 'batch_size'"),
        ("train.steps=1.5", r"--set train.steps=1.5: train.steps"),
        ("train.epochs", "give a key and a value"),
        ("=3", "give a key and a value"),
        ("seed.one=3", "seed is 4, which has no settings"),
        ("seed=[", "cannot read the value of --set seed: line 1: "),
    ],
)
def test_overrides_that_are_wrong_are_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_config(written(tmp_path), [override])


def test_paths_are_found_from_here_first_and_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for file in (here / "data" / "train.csv", beside / "data" / "train.csv", beside / "data" / "dev.csv"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(here)
    text = GOOD.replace("data/dev.csv", "data/dev.csv:test")
    config = load_config(written(beside, text))
    assert config.data.train == "data/train.csv"
    assert config.data.eval == str(beside / "data" / "dev.csv:test")
    assert config.base == "minilm"


def test_plain_data_and_back(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    assert parse_config(config.plain()) == config
    assert load_config(written(tmp_path, yaml.safe_dump(config.plain()))) == config


def test_changed_keys_are_those_that_change_the_result(tmp_path: Path) -> None:
    def config(**train: object) -> TuneConfig:
        return parse_config(yaml.safe_load(GOOD) | {"train": {"epochs": 2, **train}})

    assert changed_keys(config(), config(lr=1.0, batch_size=3)) == ["train.batch_size", "train.lr"]
    assert changed_keys(config(precision="bf16"), config(precision="auto")) == []
    assert changed_keys(config(precision="bf16"), config(precision="fp32")) == ["train.precision"]
    assert changed_keys(config(), config(checkpoint_every=5)) == []


def test_the_schema_describes_every_setting() -> None:
    schema = TuneConfig.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(entry.get("description") for entry in schema["properties"].values())
    settings = schema["$defs"]["TrainSettings"]["properties"]
    assert {"epochs", "steps", "lr", "precision"} <= settings.keys()
    assert all(entry.get("description") for entry in settings.values())


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("method: lora", "method: &a {name: lora, more: *a}", "run.yaml, line 6: the value of method.more contains it"),
        ("method: lora", "method: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("seed: 4", "? [a]\n: 4", r"run.yaml, line 10: a key has to be a text, not a list"),
        ("seed: 4", "1: 4", r"run.yaml, line 10: a key has to be a text, not '1'"),
        ("seed: 4", "seed: !mine 4", r"run.yaml: line 10: could not determine a constructor for the tag '!mine'$"),
        ("seed: 4", "seed: 2024-13-45", r"run.yaml, line 10: '2024-13-45' is no value: month must be in 1\.\.12"),
        ("seed: 4", "seed: " + "1" * 5000, "run.yaml, line 10: '1{40}' is no value"),
        ("seed: 4", "seed: 4294967296", "line 10: seed: .*less than 4294967296"),
        ("out: runs/one", 'out: "a\\0b"', "line 11: out: .* has a NUL character in it"),
        ("epochs: 2", "epochs: .inf", r"line 8: train.epochs: Input should be a finite number"),
        ("lr: 1e-3", "lr: .nan", r"line 9: train.lr: Input should be"),
        ("epochs: 2", "batch_size: true", r"line 8: train.batch_size: true is neither a number nor a text"),
        ("method: lora", "method: {name: lora, lr: .inf}", "line 6: method: every number has to be finite"),
        ("text: sentence", "text: label", "line 2: task: text and label are the same column 'label'"),
    ],
)
def test_what_yaml_cannot_mean_is_one_message_with_its_line(
    tmp_path: Path, before: str, after: str, expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_config(written(tmp_path, GOOD.replace(before, after)))


@pytest.mark.parametrize("value", ["2024-13-45", "&a [*a]", "!mine 4", "{1: 2}", "1" * 5000])
def test_overrides_that_yaml_cannot_mean_are_one_message(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match="the value of --set seed") as refused:
        load_config(written(tmp_path), [f"seed={value}"])
    assert "\n" not in str(refused.value)
