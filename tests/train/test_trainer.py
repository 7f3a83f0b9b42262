"""Training: resuming to the same bits, stopping when told or when it goes wrong, and files without pickle."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finegraft.errors import RecipeError, StoreError, TrainingError
from finegraft.grafting import graft
from finegraft.recipe import Recipe, Train
from finegraft.train import checkpoint as checkpoint_files
from finegraft.train.cadence import Cadence
from finegraft.train.interruption import TrainingInterrupted
from finegraft.train.optimizers import make_optimizer, training_arguments
from finegraft.train.trainer import GraftTrainer
from tests.train.tiny import BagOfTokens, collate, tiny_rows


def recipe(*, dropout: float = 0.1, **train: Any) -> Recipe:
    what = {"kind": "low-rank", "rank": 2, "dropout": dropout}
    settings = {"lr": 0.05, "weight_decay": 0.01} | train
    return Recipe.parse({"parts": [{"where": {"name": "hidden"}, "what": what}], "train": settings})


class AtStep(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act()


def trainer_in(folder: Path, *, rows: Any = None, made_by: Recipe | None = None, **settings: Any) -> GraftTrainer:
    rows = tiny_rows() if rows is None else rows
    arguments = {"epochs": 3.0, "batch_size": 4, "gradient_accumulation": 1, "steps": None}
    arguments |= {name: settings.pop(name) for name in list(settings) if name in arguments}
    model = settings.pop("model", None) or BagOfTokens()
    planted = graft(model, made_by or recipe())
    args = training_arguments(planted.recipe.train, out=folder, **arguments)
    return GraftTrainer(
        model, planted, args, train_dataset=rows, collate=collate, lengths=rows["length"][:], **settings
    )


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_after(step: int, folder: Path, **settings: Any) -> Path:
    trainer = trainer_in(folder, callbacks=[AtStep(step, press_ctrl_c)], **settings)
    with pytest.raises(TrainingInterrupted, match=f"after step {step} of"):
        trainer.train()
    return folder / f"checkpoint-{step}"


def assert_same(one: GraftTrainer, other: GraftTrainer) -> None:
    first, second = one.graft.state(), other.graft.state()
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.losses == other.losses
    assert [{**e} for e in one.evaluations] == [{**e} for e in other.evaluations]


@pytest.mark.parametrize("step", [1, 4, 6, 11])  # within epochs of 6 steps, and at the end of one
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_training_gives_the_same_bits(tmp_path: Path, step: int, accumulation: int) -> None:
    settings = {"gradient_accumulation": accumulation, "epochs": 3.0 * accumulation}
    whole = trainer_in(tmp_path / "whole", **settings)
    whole.train()
    saved = interrupted_after(step, tmp_path / "parts", **settings)
    resumed = trainer_in(tmp_path / "parts", **settings)
    resumed.train(saved)
    assert len(resumed.losses) == 18
    assert_same(whole, resumed)


def test_resuming_twice_with_evaluations_gives_the_same_bits(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        return {"cadence": Cadence(eval_every=4), "evaluation": lambda: {"draw": float(torch.rand(()))}}

    whole = trainer_in(tmp_path / "whole", **settings())
    whole.train()
    first = interrupted_after(3, tmp_path / "parts", **settings())
    again = trainer_in(tmp_path / "parts", callbacks=[AtStep(8, press_ctrl_c)], **settings())
    with pytest.raises(TrainingInterrupted):
        again.train(first)
    resumed = trainer_in(tmp_path / "parts", **settings())
    resumed.train(tmp_path / "parts" / "checkpoint-8")
    assert [entry["step"] for entry in whole.evaluations] == [4, 8, 12, 16]
    assert_same(whole, resumed)


def test_resuming_a_finished_training_changes_nothing(tmp_path: Path) -> None:
    whole = trainer_in(tmp_path, steps=4)
    whole.train()
    resumed = trainer_in(tmp_path, steps=4)
    resumed.train(tmp_path / "checkpoint-4")
    assert len(resumed.losses) == 4
    assert_same(whole, resumed)


def test_training_changes_only_what_the_graft_trains(tmp_path: Path) -> None:
    model = BagOfTokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_in(tmp_path, model=model)
    start = {name: value.clone() for name, value in trainer.graft.state().items()}
    trainer.train()
    assert any(not torch.equal(start[name], value) for name, value in trainer.graft.state().items())
    assert torch.equal(before["embed.weight"], dict(model.named_parameters())["embed.weight"])


def test_checkpoints_hold_what_trains_and_no_pickle(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, cadence=Cadence(checkpoint_every=5))
    trainer.train()
    folders = checkpoint_files.checkpoints(tmp_path)
    assert [folder.name for folder in folders] == ["checkpoint-15", "checkpoint-18"]  # the newest two
    held = {file.name for file in folders[-1].iterdir()}
    assert held == {
        "trained.safetensors",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "checkpoint.json",
        "trainer_state.json",
    }
    for file in tmp_path.rglob("*"):
        if file.is_file():
            start = file.read_bytes()[:9]
            assert start[:1] == b"{" or start[8:9] == b"{", f"{file} is neither JSON nor safetensors"
    stored = checkpoint_files.read_tensors(folders[-1] / "trained.safetensors")
    assert stored.keys() == trainer.graft.state().keys()


def test_a_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    saved = interrupted_after(2, tmp_path)
    with pytest.raises(StoreError, match="other training rows"):
        trainer_in(tmp_path, rows=tiny_rows(count=30)).train(saved)


@pytest.mark.parametrize("name", ["trained.safetensors", "checkpoint.json", "trainer_state.json", "rng-0.safetensors"])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    saved = interrupted_after(2, tmp_path)
    file = saved / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(StoreError, match=name):
        trainer_in(tmp_path).train(saved)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    class Failing(BagOfTokens):
        calls = 0

        def forward(self, **batch: Any) -> dict[str, Any]:
            outputs = super().forward(**batch)
            self.calls += 1
            return outputs | {"loss": outputs["loss"] * (float("nan") if self.calls == 4 else 1.0)}

    good = trainer_in(tmp_path / "good", epochs=1.0, steps=3, made_by=recipe(schedule="constant", warmup=0.0))
    good.train()
    trainer = trainer_in(tmp_path / "bad", model=Failing(), made_by=recipe(schedule="constant", warmup=0.0))
    with pytest.raises(TrainingError, match=r"loss became nan at step 4; .*after step 3, is in .*lower learning rate"):
        trainer.train()
    kept = checkpoint_files.read_tensors(tmp_path / "bad" / "checkpoint-3" / "trained.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in good.graft.state().items())
    assert all(torch.equal(kept[name], value) for name, value in trainer.graft.state().items())


def test_a_gradient_that_is_no_number_stops_before_it_does_harm(tmp_path: Path) -> None:
    class Steep(BagOfTokens):
        def forward(self, **batch: Any) -> dict[str, Any]:
            outputs = super().forward(**batch)
            flat = outputs["logits"] * 0.0
            return outputs | {"loss": outputs["loss"] + torch.sqrt(flat).sum()}  # finite, with an infinite slope

    trainer = trainer_in(tmp_path, model=Steep())
    start = {name: value.clone() for name, value in trainer.graft.state().items()}
    with pytest.raises(TrainingError, match=r"norm of the gradient became .* at step 1"):
        trainer.train()
    assert all(torch.equal(start[name], value) for name, value in trainer.graft.state().items())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_says_what_to_lower(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        raise error

    trainer = trainer_in(tmp_path, callbacks=[AtStep(2, fail)])
    with pytest.raises(TrainingError, match=r"out of memory at step 2: lower train.batch_size \(now 4; 2 with"):
        trainer.train()


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        trainer_in(tmp_path, callbacks=[AtStep(2, fail)]).train()


def test_a_second_ctrl_c_aborts_at_once(tmp_path: Path) -> None:
    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, callbacks=[AtStep(2, press_twice)]).train()
    assert signal.getsignal(signal.SIGINT) is before
    assert not checkpoint_files.checkpoints(tmp_path)


def test_a_disk_that_is_full_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = interrupted_after(2, tmp_path)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finegraft.train.trainer.write_random_state", full)
    with pytest.raises(StoreError, match="No space left on device"):
        trainer_in(tmp_path, cadence=Cadence(checkpoint_every=4)).train(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_accumulated_batches_train_like_one_large_batch(tmp_path: Path) -> None:
    rows = tiny_rows(count=16)
    settings = {"rows": rows, "made_by": recipe(dropout=0.0, clip=None)}
    large = trainer_in(tmp_path / "large", batch_size=16, **settings)
    small = trainer_in(tmp_path / "small", batch_size=4, gradient_accumulation=4, **settings)
    for trainer in (large, small):
        trainer.model.dropout.p = 0.0
        trainer.train()
    assert len(large.losses) == 3
    assert large.losses == pytest.approx(small.losses, rel=1e-5)


def test_optimizers_are_those_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    made = make_optimizer(Train(optimizer="sgd", lr=0.5), [{"params": [weight], "lr": 0.1, "name": "all"}])
    assert isinstance(made, torch.optim.SGD)
    assert made.param_groups[0]["lr"] == 0.1
    with pytest.raises(RecipeError, match="did you mean 'adamw'"):
        make_optimizer(Train(optimizer="adamwx"), [{"params": [weight]}])


@pytest.mark.parametrize("name", ["lbfgs", "sparseadam", "muon"])  # the last one takes matrices only
def test_optimizers_that_cannot_train_a_graft_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"optimizer '{name}'"):
        make_optimizer(Train(optimizer=name), [{"params": [torch.nn.Parameter(torch.zeros(2))]}])


def test_trackers_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.report_to: nonsense is not supported"):
        training_arguments(Train(), out=tmp_path, report_to=("nonsense",))


@pytest.mark.parametrize(
    "name",
    [
        "trained.safetensors",
        "optimizer.safetensors",
        "checkpoint.json",
        "trainer_state.json",
        "rng-0.safetensors",
    ],
)
def test_a_checkpoint_with_one_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    saved = interrupted_after(2, tmp_path)
    content = bytearray((saved / name).read_bytes())
    place = content.index(b"losses") + 11 if name == "checkpoint.json" else len(content) - 5
    content[place] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(StoreError, match=f"{name} is damaged|cannot read .*{name}"):
        trainer_in(tmp_path).train(saved)


def test_a_user_s_file_in_a_checkpoint_stays(tmp_path: Path) -> None:
    saved = interrupted_after(2, tmp_path)
    (saved / "mine.txt").write_text("precious")
    trainer_in(tmp_path, cadence=Cadence(checkpoint_every=4)).train(saved)
    assert [file.name for file in saved.iterdir()] == ["mine.txt"]


def test_a_checkpoint_is_promised_only_where_there_is_one(tmp_path: Path) -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(TrainingError) as without:
        trainer_in(tmp_path, callbacks=[AtStep(2, fail)]).train()
    with pytest.raises(TrainingError, match=r"; the steps up to .*checkpoint-1 are saved$"):
        trainer_in(tmp_path, callbacks=[AtStep(2, fail)], cadence=Cadence(checkpoint_every=1)).train()
    assert str(without.value).endswith("by task.max_length")
