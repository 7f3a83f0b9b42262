"""The main job: what it leaves, how it is interrupted and resumed, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from finegraft.errors import DataError, RecipeError, StoreError, TrainingError
from finegraft.recipe import Recipe
from finegraft.run import tune as tune_module
from finegraft.run.config_file import load_config
from finegraft.run.evaluate import evaluate
from finegraft.run.result import summary_rows
from finegraft.run.trained import load_trained
from finegraft.run.tune import tune
from finegraft.store import read
from finegraft.train.checkpoint import checkpoints
from finegraft.train.precision import Precision
from tests.run.conftest import Configure
from tests.run.tiny import rows_of, write_image_base, write_images, write_rows

FINISHED = {"graft", "metrics.json", "recipe.yaml", "config.yaml", "report.html"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same_graft(one: Path, other: Path) -> bool:
    first, second = (read(folder / "graft")[0] for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def unfinished(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, step: int) -> Path:
    """Runs a configuration until Ctrl-C is pressed during a step."""
    original = tune_module.GraftTrainer.training_step

    def pressing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tune_module.GraftTrainer, "training_step", pressing)
        with pytest.raises(tune_module.TrainingInterrupted, match="--resume"):
            tune(config)
    return Path(config["out"])


def test_a_run_learns_and_leaves_everything_about_itself(configure: Configure) -> None:
    config = configure(train={"epochs": 6, "lr": 0.01})
    told: list[str] = []
    result = tune(config, tell=told.append)
    assert names(result.out) == FINISHED
    assert result.score >= 0.9 > result.metrics["before"]["accuracy"]
    stored = json.loads((result.out / "metrics.json").read_text())
    assert stored["after"] == result.metrics["after"]
    assert stored["steps"] == 48
    assert [entry["step"] for entry in stored["evaluations"]] == [8, 16, 24, 32, 40, 48]
    assert (
        stored["trainable_parameters"]
        == result.graft.num_trainable
        == sum(p.numel() for p in result.graft.parameters())
    )
    assert stored["graft_bytes"] == sum(file.stat().st_size for file in (result.out / "graft").iterdir())
    assert Recipe.load(result.out / "recipe.yaml") == result.graft.recipe
    assert load_config(result.out / "config.yaml").train.lr == 0.01
    assert result.graft.report in told[0]
    assert dict(summary_rows(stored))["accuracy after"] == f"{result.score:.4f}"


def test_the_saved_graft_on_a_fresh_base_scores_the_same(configure: Configure, tables: dict[str, str]) -> None:
    result = tune(configure())
    assert evaluate(result.out, tables["eval"]) == pytest.approx(result.metrics["after"], rel=1e-5)
    trained = load_trained(result.out / "graft")
    assert trained.labels == ["blame", "praise"]
    assert (trained.task.kind, trained.task.label) == ("classification", "label")


def test_nothing_in_a_run_is_pickled(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = unfinished(configure(out="one"), monkeypatch, step=4)
    finished = tune(configure(out="two")).out
    files = [file for folder in (interrupted, finished) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            assert content[8:9] == b"{"
        else:
            content.decode("utf-8")


def test_a_resumed_run_gives_the_same_as_an_uninterrupted_one(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(configure(out="whole"))
    config = configure(out="parts")
    folder = unfinished(config, monkeypatch, step=11)
    assert names(folder) == {"config.yaml", "recipe.yaml", "start.json", "checkpoint-8", "checkpoint-11"}
    resumed = tune(config, resume=True)
    assert names(folder) == FINISHED
    assert same_graft(whole.out, resumed.out)
    timeless = [name for name in whole.metrics if name not in ("training_seconds", "peak_memory_bytes", "graft_bytes")]
    assert {name: whole.metrics[name] for name in timeless} == {name: resumed.metrics[name] for name in timeless}


def test_a_run_that_was_killed_by_ctrl_c_in_a_terminal_can_be_resumed(configure: Configure, tmp_path: Path) -> None:
    settings = {"steps": 200, "checkpoint_every": 1000, "eval_every": 1000}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(configure(out="parts", train=settings)))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "finegraft.cli", "tune", str(file)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("step 1/200"):
        assert line, f"the run ended early with {process.wait()}"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert "--resume" in message
    assert "Traceback" not in message
    (checkpoint,) = checkpoints(tmp_path / "parts")
    assert checkpoint.name in message
    resumed = tune(file, resume=True)
    whole = tune(configure(out="whole", train=settings))
    assert same_graft(whole.out, resumed.out)
    assert whole.metrics["loss_curve"] == resumed.metrics["loss_curve"]


def test_a_run_that_failed_after_its_last_step_is_finished_by_resuming(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise StoreError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tune_module, "_write", full)
        with pytest.raises(StoreError, match="No space left"):
            tune(configure(out="parts"))
    resumed = tune(configure(out="parts"), resume=True)
    assert resumed.metrics["steps"] == 24
    assert same_graft(tune(configure(out="whole")).out, resumed.out)


def test_the_measured_precision_is_kept_for_resuming(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "choose_precision", lambda *args, **kwargs: Precision("bf16", "measured so"))
    config = configure(train={"precision": "auto"})
    folder = unfinished(config, monkeypatch, step=3)
    assert load_config(folder / "config.yaml").train.precision == "bf16"
    monkeypatch.setattr(tune_module, "choose_precision", lambda *args, **kwargs: pytest.fail("measured again"))
    result = tune(config, resume=True)
    assert (result.metrics["precision"], result.metrics["precision_reason"]) == ("bf16", "measured so")


def test_a_finished_run_is_not_overwritten_silently(configure: Configure, tmp_path: Path) -> None:
    config = configure(train={"steps": 2})
    before = tune(config).metrics["after"]
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"finished run.*--overwrite"):
        tune(config)
    with pytest.raises(RecipeError, match="nothing to resume"):
        tune(config, resume=True)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["after"] == before
    assert tune(configure(train={"steps": 3}), overwrite=True).metrics["steps"] == 3
    assert names(tmp_path / "run") == FINISHED | {"notes.txt"}


def test_an_interrupted_run_is_not_overwritten_silently(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    folder = unfinished(config, monkeypatch, step=3)
    with pytest.raises(RecipeError, match="interrupted run: continue it with --resume"):
        tune(config)
    assert (folder / "checkpoint-3").is_dir()


def test_a_failing_replacement_leaves_the_earlier_run(configure: Configure, tmp_path: Path) -> None:
    tune(configure(train={"steps": 2}))
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        tune(configure(method="lorra"), overwrite=True)
    with pytest.raises(DataError):
        tune(configure(task={"kind": "classification", "label": "klass"}), overwrite=True)
    for train in ({"report_to": ["nonsense"]}, {"epochs": float("inf")}):
        with pytest.raises(RecipeError):
            tune(configure(train=train), overwrite=True)
    for method in ({"optimizer": "lbfgs"}, {"betas": [2, 2]}, {"optimizer": "muon", "heads": "auto"}):
        with pytest.raises(RecipeError, match="optimizer|betas"):
            tune(configure(method={"name": "lora", **method}), overwrite=True)
    assert names(tmp_path / "run") == FINISHED


def test_resuming_needs_an_interrupted_run_of_the_same_configuration(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"no interrupted run in .*without --resume"):
        tune(configure(), resume=True)
    unfinished(configure(), monkeypatch, step=3)
    with pytest.raises(RecipeError, match=r"train.lr was 0.02 and is 0.5"):
        tune(configure(train={"lr": 0.5}), resume=True)
    with pytest.raises(RecipeError, match=r"method.rank was 2 and is 4"):
        tune(configure(method={"name": "lora", "rank": 4, "dropout": 0.1}), resume=True)


def test_a_loss_that_is_no_number_keeps_the_last_good_graft(configure: Configure) -> None:
    recipe = {"parts": [{"where": {"type": "linear", "role": "!head"}, "what": {"kind": "low-rank"}}]}
    config = configure(method=recipe | {"train": {"clip": None, "warmup": 0.0}}, train={"lr": 1e25})
    with pytest.raises(
        TrainingError, match=r"(?s)at step \d+; .*lower learning rate.*last-good has the graft"
    ) as caught:
        tune(config)
    folder = Path(config["out"])
    assert not (folder / "metrics.json").exists()
    trained = load_trained(folder / "last-good")
    assert all(torch.isfinite(p).all() for p in trained.graft.parameters()), caught.value


def test_what_cannot_be_carried_out_leaves_nothing(
    configure: Configure, tmp_path: Path, tables: dict[str, str]
) -> None:
    unseen = write_rows(
        tmp_path / "unseen.jsonl", [{"text": "a film", "label": "praise"}, {"text": "a", "label": "new"}]
    )
    cases = [
        (configure(data={"train": tables["train"], "eval": unseen}), DataError, "'new'"),
        (configure(data={"eval": tables["eval"]}), RecipeError, "data.train is missing"),
        (configure(base=str(tmp_path / "nowhere")), RecipeError, "nowhere"),
        (configure(method={"name": "lora", "rank": 0}), RecipeError, "rank"),
    ]
    for config, error, expected in cases:
        with pytest.raises(error, match=expected):
            tune(config)
        assert not Path(config["out"]).exists()


@pytest.mark.parametrize("kind", ["regression", "token-classification", "sentence-embedding"])
def test_other_text_tasks_run_through(kind: str, configure: Configure, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", rows_of(kind, 24, 0))
    data = {"train": train, "eval": train, "test": write_rows(tmp_path / "test.jsonl", rows_of(kind, 16, 2))}
    result = tune(configure(task={"kind": kind}, data=data, train={"epochs": 6}))
    headline = result.metrics["headline"]
    assert result.metrics["after"]["loss"] < result.metrics["before"]["loss"]
    assert evaluate(result.out, data["test"])[headline] == pytest.approx(result.metrics["test"][headline], rel=1e-4)


def test_images_run_through(configure: Configure, tmp_path: Path) -> None:
    write_image_base(tmp_path / "vit")
    folder = write_images(tmp_path / "squares", 12)
    data = {"train": folder, "eval": folder}
    result = tune(configure(base=str(tmp_path / "vit"), task={"kind": "image-classification"}, data=data))
    assert result.metrics["after"]["loss"] < result.metrics["before"]["loss"]


def test_text_runs_through_a_real_language_model(configure: Configure, tmp_path: Path) -> None:
    data = Path(__file__).parents[2] / "data"
    config = configure(
        base=str(data / "stories260k"),
        task={"kind": "causal-lm", "max_length": 64},
        data={
            "train": str(data / "shakespeare" / "train.txt"),
            "eval": str(data / "shakespeare" / "dev.txt"),
            "limit": 60,
        },
        train={"epochs": 1, "batch_size": 4},
    )
    result = tune(config)
    assert result.metrics["headline"] == "perplexity"
    assert result.metrics["after"]["perplexity"] < result.metrics["before"]["perplexity"]
