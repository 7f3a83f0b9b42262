"""From tables to batches, on real rows with the real tokenizers."""

import datasets
import numpy as np
import pytest
import torch
import transformers

from finegraft.data.collate import collator
from finegraft.data.images import PlainImages
from finegraft.data.metrics import join
from finegraft.data.prepare import encode, prepare
from finegraft.data.task import Data, Task
from finegraft.errors import DataError
from tests.data.conftest import DATA

SST2 = Data(train=DATA / "sst2/train.csv", eval=DATA / "sst2/dev.csv", limit=200)
CLASSIFICATION = Task(kind="classification")


def rows_of(prepared, dataset, count):
    return prepared.collate([dataset[row] for row in range(count)])


def write(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(path)


def test_sentences_become_batches_padded_to_the_longest(minilm):
    prepared = prepare(CLASSIFICATION, minilm.processor, SST2)
    assert prepared.labels == ["0", "1"] and prepared.headline == "accuracy" and prepared.higher_is_better
    assert (len(prepared.train), len(prepared.eval), prepared.test) == (200, 200, None)
    batch = rows_of(prepared, prepared.train, 8)
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].shape == (8, max(prepared.lengths(prepared.train)[:8]))
    assert batch["attention_mask"].sum(1).tolist() == prepared.lengths(prepared.train)[:8]
    text = minilm.processor.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert text.startswith("a stirring, funny and finally transporting re - imagining of beauty and the beast")


def test_collating_agrees_with_the_tokenizers_own_padding(minilm):
    prepared = prepare(CLASSIFICATION, minilm.processor, SST2)
    batch = rows_of(prepared, prepared.eval, 16)
    texts = [minilm.processor.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    theirs = minilm.processor(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    assert torch.equal(batch["attention_mask"], theirs["attention_mask"])


def test_a_limit_covers_both_classes(minilm):
    prepared = prepare(CLASSIFICATION, minilm.processor, SST2.model_copy(update={"limit": 20}))
    assert len(prepared.train) == 20 and set(prepared.train["labels"][:]) == {0, 1}


def test_given_labels_decide_the_numbers(minilm):
    data = Data(eval=DATA / "sst2/dev.csv", limit=50)
    given = prepare(CLASSIFICATION, minilm.processor, data, labels=["1", "0"])
    usual = prepare(CLASSIFICATION, minilm.processor, data, labels=["0", "1"])
    assert given.train is None
    assert given.eval["labels"][:] == [1 - label for label in usual.eval["labels"][:]]


def test_a_pair_is_read_as_one_input_of_two_types(minilm, tmp_path):
    path = write(tmp_path / "pairs.parquet", a=["one two", "three"], b=["four", "five six"], label=[4.5, 0.0])
    task = Task(kind="regression", text="a", text_pair="b")
    prepared = prepare(task, minilm.processor, Data(train=path, eval=path))
    batch = rows_of(prepared, prepared.eval, 2)
    theirs = minilm.processor(["one two", "three"], ["four", "five six"], padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], theirs[name]) for name in theirs)
    assert batch["labels"].tolist() == [4.5, 0.0] and prepared.headline == "spearman"


def test_long_texts_are_cut_and_too_long_a_limit_refused(minilm):
    task = Task(kind="classification", max_length=7)
    prepared = prepare(task, minilm.processor, SST2)
    assert max(prepared.lengths(prepared.train)) == 7
    with pytest.raises(DataError, match="max_length 513 is more than the 512"):
        prepare(Task(kind="classification", max_length=513), minilm.processor, SST2)


def test_padding_to_a_multiple_is_possible(minilm):
    rows = [{"input_ids": [1] * 9}, {"input_ids": [1] * 3}]
    assert collator(CLASSIFICATION, minilm.processor, multiple=8)(rows)["input_ids"].shape == (2, 16)
    assert collator(CLASSIFICATION, minilm.processor)(rows)["input_ids"].shape == (2, 9)


@pytest.mark.parametrize(
    "columns, part",
    [
        ({"text": ["a", None, "b"], "label": [0, 1, 1]}, "row 2 has no value in column 'text'"),
        ({"text": ["a", "b", " "], "label": [0, 1, 1]}, "row 3 has a blank text"),
        ({"text": [["a"], ["b"]], "label": [0, 1]}, "holds list values"),
        ({"sentence": ["a", "b"], "label": [0, 1]}, "no column 'text'.*label, sentence"),
        ({"text": ["a", "b"], "label": [1, 1]}, "two classes"),
        ({"text": ["a", "b"]}, "no column 'label'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(minilm, tmp_path, columns, part):
    path = write(tmp_path / "bad.parquet", **columns)
    with pytest.raises(DataError, match=part) as error:
        prepare(CLASSIFICATION, minilm.processor, Data(train=path, eval=DATA / "sst2/dev.csv"))
    assert path in str(error.value)


@pytest.mark.parametrize("numbers, part", [([1.0, 1.0], "nothing can be learnt"), (["1", "high"], "row 2 has 'high'")])
def test_numbers_that_cannot_be_used_are_named(minilm, tmp_path, numbers, part):
    path = write(tmp_path / "bad.parquet", text=["a", "b"], label=numbers)
    with pytest.raises(DataError, match=part):
        prepare(Task(kind="regression"), minilm.processor, Data(train=path, eval=path))


def test_a_word_is_scored_at_its_first_token(minilm, tmp_path):
    path = write(
        tmp_path / "words.parquet",
        tokens=[["Socrates", "drank", "hemlock"], ["No"]],
        label=[["B", "O", "O"], ["O"]],
    )
    prepared = prepare(Task(kind="token-classification"), minilm.processor, Data(train=path, eval=path))
    batch = rows_of(prepared, prepared.eval, 2)
    pieces = minilm.processor.convert_ids_to_tokens(batch["input_ids"][0])
    assert pieces == ["[CLS]", "socrates", "drank", "hem", "##lock", "[SEP]"]
    assert batch["labels"].tolist() == [[-100, 0, 1, 1, -100, -100], [-100, 1, -100, -100, -100, -100]]
    assert prepared.labels == ["B", "O"] and prepared.headline == "f1"


@pytest.mark.parametrize(
    "tokens, label, part",
    [
        ([["a", "b"], ["c"]], [["B", "O"], ["O", "O"]], "row 2 needs one label for each of its 1 words"),
        ([["a"], []], [["B"], ["O"]], "row 2 .*not a list of words"),
        (["a", "b"], [["B"], ["O"]], "row 1 .*not a list of words"),
        ([["a"], ["b"]], ["B", "O"], "a list of labels"),
    ],
)
def test_words_and_labels_must_go_together(minilm, tmp_path, tokens, label, part):
    path = write(tmp_path / "bad.parquet", tokens=tokens, label=label)
    with pytest.raises(DataError, match=part):
        prepare(Task(kind="token-classification"), minilm.processor, Data(train=path, eval=path))


SHAKESPEARE = Data(train=DATA / "shakespeare/train.txt", eval=DATA / "shakespeare/dev.txt")


def test_blocks_of_text_lose_nothing_in_evaluation(stories):
    prepared = prepare(Task(kind="causal-lm", max_length=64), stories.processor, SHAKESPEARE)
    assert set(prepared.lengths(prepared.train)) == {64}
    ids = np.concatenate(prepared.eval["input_ids"][:])
    text = (DATA / "shakespeare/dev.txt").read_text()
    assert ids.tolist() == stories.processor(text, verbose=False)["input_ids"]
    batch = prepared.collate([prepared.eval[0], prepared.eval[len(prepared.eval) - 1]])
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool())


def test_overlapping_blocks_score_each_token_once(stories):
    task = Task(kind="causal-lm", max_length=64, stride=16)
    prepared = prepare(task, stories.processor, SHAKESPEARE)
    labels = [prepared.collate([row])["labels"][0] for row in prepared.eval]
    scored = torch.cat([labels[0], *(part[part != -100] for part in labels[1:])])
    assert scored.tolist() == stories.processor((DATA / "shakespeare/dev.txt").read_text(), verbose=False)["input_ids"]
    assert (labels[1] != -100).sum() == 16


def test_perplexity_of_the_language_model_is_that_of_one_pass_over_each_block(stories):
    prepared = prepare(Task(kind="causal-lm", max_length=64), stories.processor, SHAKESPEARE)
    results, losses = [], []
    for start in (0, 3):
        batch = prepared.collate([prepared.eval[row] for row in range(start, start + 3)])
        with torch.no_grad():
            output = stories.model(**batch)
        results.append(prepared.reduce(output.logits, batch["labels"]).numpy())
        losses.append(output.loss.item())
    scores = prepared.metrics(join(results), np.empty(0))
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert prepared.headline == "perplexity" and not prepared.higher_is_better


def test_texts_without_marks_of_their_own_are_set_apart(stories, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "stories260k")
    path = write(tmp_path / "texts.parquet", text=["one day", "", "the end"])
    marked = prepare(Task(kind="causal-lm"), tokenizer, Data(eval=path)).eval["input_ids"][0]
    assert marked.count(tokenizer.bos_token_id) == 2 and tokenizer.eos_token_id not in marked
    tokenizer.backend_tokenizer.post_processor = None
    bare = prepare(Task(kind="causal-lm"), tokenizer, Data(eval=path)).eval["input_ids"][0]
    assert bare.count(tokenizer.eos_token_id) == 2 and tokenizer.bos_token_id not in bare


def test_too_little_text_is_an_error(stories, tmp_path):
    path = write(tmp_path / "texts.parquet", text=["", "  "])
    with pytest.raises(DataError, match="holds 0 tokens"):
        prepare(Task(kind="causal-lm"), stories.processor, Data(eval=path))


def test_pairs_of_sentences_have_a_side_axis(minilm, tmp_path):
    path = write(tmp_path / "pairs.parquet", text=["a plane", "rain"], text_pair=["an air plane", "sun"], score=[5, 1])
    prepared = prepare(Task(kind="sentence-embedding", score_scale=5), minilm.processor, Data(train=path, eval=path))
    batch = rows_of(prepared, prepared.eval, 2)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, 5)
    assert minilm.processor.decode(batch["input_ids"][0, 1], skip_special_tokens=True) == "an air plane"
    assert batch["labels"].tolist() == pytest.approx([1, 0.2]) and prepared.headline == "spearman"
    with pytest.raises(DataError, match="reaches 5.*score_scale"):
        prepare(Task(kind="sentence-embedding"), minilm.processor, Data(train=path, eval=path))


def test_pairs_without_a_score_are_labelled_with_their_partner(minilm, tmp_path):
    path = write(tmp_path / "pairs.parquet", text=["a plane", "rain"], text_pair=["an air plane", "sun"])
    prepared = prepare(Task(kind="sentence-embedding"), minilm.processor, Data(train=path, eval=path))
    batch = rows_of(prepared, prepared.eval, 2)
    scored = write(tmp_path / "scored.parquet", text=["a"], text_pair=["b"], score=[1.0])
    with pytest.raises(DataError, match="only one has scores"):
        prepare(Task(kind="sentence-embedding"), minilm.processor, Data(eval=path, test=scored))
    assert batch["labels"].tolist() == [0, 1] and not batch["labels"].is_floating_point()
    assert prepared.headline == "accuracy"


def test_images_are_turned_into_pixels_batch_by_batch():
    data = Data(train=DATA / "fashion_mnist/train.parquet", eval=DATA / "fashion_mnist/test.parquet", limit=30)
    prepared = prepare(Task(kind="image-classification"), PlainImages((14, 14), channels=1), data)
    assert prepared.labels[:2] == ["T-shirt/top", "Trouser"] and len(prepared.eval) == 30
    batch = rows_of(prepared, prepared.train, 4)
    assert batch["pixel_values"].shape == (4, 1, 14, 14) and batch["labels"].shape == (4,)
    assert -1 <= batch["pixel_values"].min() < -0.9 and 0.5 < batch["pixel_values"].max() <= 1


def test_a_row_without_an_image_is_named(tmp_path):
    path = write(tmp_path / "images.parquet", image=[b"1", None], label=[0, 1])
    with pytest.raises(DataError, match="row 2 has no image"):
        prepare(Task(kind="image-classification"), PlainImages((8, 8)), Data(train=path, eval=path))


@pytest.mark.parametrize(
    "kind, columns",
    [
        ("classification", {"text": ["a b", "c"]}),
        ("causal-lm", {"text": ["a b", "c"]}),
        ("sentence-embedding", {"text": ["a b", "c"]}),
        ("token-classification", {"tokens": [["a", "b"], ["c"]]}),
    ],
)
def test_prediction_needs_no_labels_and_keeps_the_order(minilm, kind, columns):
    task = Task(kind=kind)
    rows = encode(task, minilm.processor, datasets.Dataset.from_dict(columns))
    batch = collator(task, minilm.processor)([rows[0], rows[1]])
    assert "labels" not in batch and batch["input_ids"].shape == (2, 4)
    assert minilm.processor.decode(batch["input_ids"][1], skip_special_tokens=True) == "c"
