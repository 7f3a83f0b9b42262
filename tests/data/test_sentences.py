"""The sentence encoder: what its vectors mean, and its two losses."""

import datasets
import pytest
import torch

from finegraft.data.base import load_base
from finegraft.data.prepare import prepare
from finegraft.data.task import Data, Task

TASK = Task(kind="sentence-embedding")
LEFT = ["a plane is taking off", "a man plays the flute", "it rains in the mountains"]
RIGHT = ["an air plane takes off", "someone is playing a flute", "there is rain over the hills"]


@pytest.fixture(scope="module")
def base():
    return load_base("minilm", TASK)


def batch_of(base, tmp_path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "pairs.parquet")
    prepared = prepare(TASK, base.processor, Data(eval=tmp_path / "pairs.parquet"))
    return prepared, prepared.collate([prepared.eval[row] for row in range(len(prepared.eval))])


def test_vectors_have_unit_length_and_ignore_padding(base):
    short = base.processor(LEFT[:1], return_tensors="pt")
    padded = base.processor(LEFT[:1], padding="max_length", max_length=30, return_tensors="pt")
    with torch.no_grad():
        alone = base.model(**short)["logits"]
        beside = base.model(**padded)["logits"]
    assert torch.allclose(alone, beside, atol=1e-5)
    assert alone.norm(dim=-1).item() == pytest.approx(1, abs=1e-5)


def test_partners_are_found_among_the_pairs_of_a_batch(base, tmp_path):
    prepared, batch = batch_of(base, tmp_path, text=LEFT, text_pair=RIGHT)
    with torch.no_grad():
        output = base.model(**batch)
    assert output["logits"].shape == (3, 3) and prepared.reduce(output["logits"], batch["labels"]).tolist() == [1, 1, 1]
    cross = torch.nn.functional.cross_entropy(output["logits"], torch.arange(3))
    assert output["loss"].item() == pytest.approx(cross.item())
    batch["labels"] = batch["labels"].roll(1)
    with torch.no_grad():
        assert base.model(**batch)["loss"] > output["loss"] + 5


def test_scores_are_compared_with_cosines(base, tmp_path):
    _, batch = batch_of(base, tmp_path, text=LEFT, text_pair=[LEFT[0], RIGHT[1], RIGHT[0]], score=[1.0, 0.8, 0.0])
    with torch.no_grad():
        output = base.model(**batch)
    cosines = output["logits"].tolist()
    assert cosines[0] == pytest.approx(1, abs=1e-5) and cosines[1] > 0.8 and cosines[2] < 0.2
    assert output["loss"].item() == pytest.approx(((output["logits"] - batch["labels"]) ** 2).mean().item())


def test_the_loss_reaches_the_encoder(base, tmp_path):
    _, batch = batch_of(base, tmp_path, text=LEFT, text_pair=RIGHT)
    weight = base.model.encoder.encoder.layer[0].attention.self.query.weight
    (gradient,) = torch.autograd.grad(base.model(**batch)["loss"], weight)
    assert gradient.abs().sum() > 0
