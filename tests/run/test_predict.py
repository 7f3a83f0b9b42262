"""Predictions: one for each line, in order, the same as the model gives by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finegraft.errors import StoreError, TrainingError
from finegraft.run import predict as predict_module
from finegraft.run.predict import predict
from finegraft.run.trained import load_trained
from finegraft.run.tune import tune
from tests.run.conftest import Configure
from tests.run.tiny import rows_of, sentences, write_image_base, write_images, write_rows

SHORT = {"epochs": 1, "steps": 3}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, text_base: str, tables: dict[str, str]) -> Path:
    return tune(
        {
            "base": text_base,
            "task": {"kind": "classification"},
            "data": tables,
            "method": "lora",
            "train": SHORT | {"precision": "fp32"},
            "out": str(tmp_path_factory.mktemp("runs") / "classifier"),
        }
    ).out


def test_answers_come_in_order_and_agree_with_the_model(classifier: Path) -> None:
    texts = [text for text, _ in sentences(50, seed=5)]
    found = list(predict(classifier, (text + "\n" for text in texts), batch_size=4))
    assert [answer["line"] for answer in found] == list(range(1, 51))
    trained = load_trained(classifier)
    for text, answer in zip(texts, found, strict=True):
        with torch.inference_mode():
            logits = trained.model(**trained.processor(text, return_tensors="pt", return_token_type_ids=False)).logits[
                0
            ]
        expected = torch.softmax(logits, -1).tolist()
        assert list(answer["scores"].values()) == pytest.approx(expected, abs=1e-5)
        assert answer["label"] == trained.labels[int(logits.argmax())]


def test_answers_come_before_the_last_line_is_read(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_module, "_BATCHES_READ_AHEAD", 1)

    def lines() -> Any:
        yield from ("a film", "the plot")
        pytest.fail("the third line was read before the first answer")

    assert next(predict(classifier, lines(), batch_size=2))["line"] == 1


def test_lines_that_cannot_be_answered_are_reported_in_their_place(classifier: Path) -> None:
    lines = ['{"text": "a fine film"}', "{", '{"txt": "a"}', '{"text": null}', "", '{"text": "a dull plot"}']
    found = list(predict(classifier, lines, jsonl=True))
    assert [sorted(answer) for answer in found] == [
        ["label", "line", "scores"],
        *[["error", "line"]] * 4,
        ["label", "line", "scores"],
    ]
    assert "not JSON" in found[1]["error"]
    assert "'text'" in found[2]["error"]
    assert found[0]["scores"] != found[5]["scores"]


def test_bytes_that_are_no_text_are_reported(classifier: Path) -> None:
    found = list(predict(classifier, ["a film", "b\udcffd"]))
    assert found[1] == {"line": 2, "error": "the line is not UTF-8"}


def test_pairs_are_set_apart_by_a_tab(configure: Configure, tmp_path: Path) -> None:
    rows = [row | {"second": "the film"} for row in rows_of("classification", 12, 0)]
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows), "eval": str(tmp_path / "rows.jsonl")}
    run = tune(configure(task={"kind": "classification", "text_pair": "second"}, data=data, train=SHORT))
    both, one = predict(run.out, ["a fine film\tthe film", "a fine film"])
    assert set(both) == {"line", "label", "scores"}
    assert one["error"] == "1 of 2 texts; set them apart by a tab"


def test_words_get_a_label_each(configure: Configure, tmp_path: Path) -> None:
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows_of("token-classification", 12, 0))}
    run = tune(configure(task={"kind": "token-classification"}, data=data | {"eval": data["train"]}, train=SHORT))
    long, short = predict(run.out, ["the film was fine and lovely", "bad plot"])
    assert (len(long["labels"]), len(short["labels"])) == (6, 2)
    assert set(long["labels"]) <= {"O", "X"}


def test_numbers_and_vectors_and_similarities(configure: Configure, tmp_path: Path) -> None:
    for kind in ("regression", "sentence-embedding"):
        write_rows(tmp_path / f"{kind}.jsonl", rows_of(kind, 12, 0))

    def run(kind: str) -> Path:
        source = str(tmp_path / f"{kind}.jsonl")
        return tune(configure(out=kind, task={"kind": kind}, data={"train": source, "eval": source}, train=SHORT)).out

    (number,) = predict(run("regression"), ["a fine film"])
    assert isinstance(number["score"], float)
    vector, same, other = predict(run("sentence-embedding"), ["a film", "a film\ta film", "a film\tdull plot"])
    assert sum(value**2 for value in vector["vector"]) == pytest.approx(1.0, rel=1e-4)
    assert same["similarity"] == pytest.approx(1.0, rel=1e-4)
    assert other["similarity"] < 0.999


def test_images_are_given_by_their_paths(configure: Configure, tmp_path: Path) -> None:
    write_image_base(tmp_path / "vit")
    folder = write_images(tmp_path / "squares", 6)
    task = {"kind": "image-classification"}
    run = tune(configure(base=str(tmp_path / "vit"), task=task, data={"train": folder, "eval": folder}, train=SHORT))
    good, bad = predict(run.out, [f"{folder}/bright/0.png", f"{folder}/absent.png"])
    assert good["label"] in ("bright", "dark")
    assert "absent.png" in bad["error"]


def test_prompts_are_continued_alike_alone_and_in_a_batch(configure: Configure) -> None:
    data = Path(__file__).parents[2] / "data"
    source = str(data / "shakespeare" / "dev.txt")
    run = tune(
        configure(
            base=str(data / "stories260k"),
            task={"kind": "causal-lm", "max_length": 32},
            data={"train": source, "eval": source, "limit": 8},
            train=SHORT,
        )
    )
    prompts = ["Once upon a time", "Lily and Tom went to the park. They"]
    together = [answer["continuation"] for answer in predict(run.out, prompts, max_new_tokens=8)]
    alone = [next(predict(run.out, [prompt], max_new_tokens=8))["continuation"] for prompt in prompts]
    assert together == alone
    assert all(text.strip() for text in together)


def test_a_graft_without_a_task_is_refused(classifier: Path, tmp_path: Path) -> None:
    load_trained(classifier).graft.save(tmp_path / "bare")
    with pytest.raises(StoreError, match="does not say what it was trained for"):
        next(predict(tmp_path / "bare", ["a"]))


def test_answers_are_plain_data(classifier: Path) -> None:
    (answer,) = predict(classifier, ["a film"])
    assert json.loads(json.dumps(answer)) == answer


def test_running_out_of_memory_says_what_to_lower(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(predict_module, "answers", full)
    with pytest.raises(TrainingError, match=r"lower --batch-size \(now 3\)"):
        next(predict(classifier, ["a film"], batch_size=3))
