"""Class names: their order, where they come from, and data that has none."""

import datasets
import pytest

from finegraft.data.labels import class_numbers, label_names
from finegraft.data.read import Tables
from finegraft.data.task import Data, Task
from finegraft.errors import DataError

TASK = Task(kind="classification")


def tables(labels, features=None):
    rows = datasets.Dataset.from_dict({"label": labels}, features=features)
    return Tables(Data(train="train.csv", eval="dev.csv"), rows, rows, None)


@pytest.mark.parametrize(
    "labels, names",
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 10], ["9", "10"]),
        ([-1, 1], ["-1", "1"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["False", "True"]),
        (["10", "9"], ["9", "10"]),
    ],
)
def test_names_are_sorted_by_value_or_alphabet(labels, names):
    assert label_names(TASK, tables(labels)) == names


def test_declared_names_are_kept_as_declared():
    features = datasets.Features({"label": datasets.ClassLabel(names=["zero", "one", "never seen"])})
    data = tables([0, 1, 1], features)
    names = label_names(TASK, data)
    assert names == ["zero", "one", "never seen"]
    assert class_numbers(data.train, "label", "t", names, by_word=False, training=True) == [0, 1, 1]


def test_kinds_without_classes_have_no_names():
    assert label_names(Task(kind="regression"), tables([1.0, 2.0])) is None


def test_words_have_classes_of_their_own():
    names = label_names(Task(kind="token-classification"), tables([["O", "B-PER"], ["O"]]))
    assert names == ["B-PER", "O"]


def test_an_absent_column_is_an_error_that_lists_the_others():
    with pytest.raises(DataError, match="train.csv has no column 'lable'.*mean 'label'"):
        label_names(Task(kind="classification", label="lable"), tables([0, 1]))


@pytest.mark.parametrize(
    "labels, part",
    [
        ([1, 1, 1], "only the class '1'"),
        ([0.5, 1.0], "fractional label 0.5.*regression"),
        ([0, None, 1], "row 2 has no value in column 'label'"),
        ([0.0, float("nan")], "row 2 has no value"),
        (["a", " "], "row 2 has ' '.*no class name"),
        ([[0], [1]], "row 1 has .*one label is needed"),
    ],
)
def test_unusable_labels_are_an_error(labels, part):
    with pytest.raises(DataError, match=part):
        label_names(TASK, tables(labels))


def test_a_declared_class_that_does_not_exist_is_an_error():
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    with pytest.raises(DataError, match="row 2 has label -1.*classes 0 to 1"):
        class_numbers(tables([0, -1], features).eval, "label", "dev.csv", ["no", "yes"], by_word=False, training=False)


def test_labels_that_never_occur_in_training_are_named():
    with pytest.raises(
        DataError, match="dev.csv: column 'label'.*never occur in training: 'maybe'.*known: 'no', 'yes'"
    ):
        rows = tables(["yes", "maybe"]).eval
        class_numbers(rows, "label", "dev.csv", ["no", "yes"], by_word=False, training=False)


def test_one_class_is_enough_to_evaluate_on_but_not_to_train_on():
    rows = tables(["yes", "yes"]).eval
    assert class_numbers(rows, "label", "dev.csv", ["no", "yes"], by_word=False, training=False) == [1, 1]
    with pytest.raises(DataError, match="at least two classes"):
        class_numbers(rows, "label", "train.csv", ["no", "yes"], by_word=False, training=True)
