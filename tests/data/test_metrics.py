"""Metrics against values worked out by hand, and the split of work between batches and the end."""

import math

import numpy as np
import pytest
import torch

from finegraft.data.metrics import PARTNERS, SCORINGS, join, macro_f1, pearson, spearman


def test_spearman_shares_ranks_among_equal_values():
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5 over sqrt(4.5 * 5)
    assert spearman(np.array([1, 5, 5, 9]), np.array([2, 8, 4, 16])) == pytest.approx(4.5 / math.sqrt(22.5))


def test_correlation_with_a_constant_is_zero():
    assert pearson(np.ones(4), np.arange(4)) == 0
    assert spearman(np.arange(4), np.zeros(4)) == 0


def test_spearman_sees_order_and_pearson_sees_distance():
    x = np.arange(1.0, 6.0)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert pearson(x, np.exp(x)) < 0.95
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1)


def test_macro_f1_weighs_classes_equally():
    # class 0: tp 3, fn 0, fp 1 -> 6/7; class 1: tp 0 -> 0
    assert macro_f1(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1])) == pytest.approx(3 / 7)


def test_classification_scores_the_largest_logit():
    scores = SCORINGS["classification"].score(np.array([[2, 1], [0, 1], [3, 0], [0, 4]]), np.array([0, 1, 1, 1]))
    assert scores["accuracy"] == 0.75


def test_perplexity_is_the_same_however_blocks_are_batched():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 9, 11), torch.randint(0, 11, (5, 9))
    labels[3, 4:] = -100
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    scoring = SCORINGS["causal-lm"]
    parts = [scoring.reduce((logits[rows],), labels[rows]).numpy() for rows in (slice(0, 2), slice(2, 5))]
    assert join(parts).shape == (5, 2)
    scores = scoring.score(join(parts), labels.numpy())
    assert scores["loss"] == pytest.approx(whole.item(), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(whole.item()), rel=1e-6)
    assert not scoring.higher_is_better


def test_word_scores_leave_out_padding_and_rest_of_words():
    scoring = SCORINGS["token-classification"]
    wide, narrow = (torch.eye(3)[words].unsqueeze(0) for words in ([0, 1, 2], [2, 2]))
    labels = [np.array([[0, -100, 1]]), np.array([[2, 2]])]
    predictions = join([scoring.reduce(part, torch.tensor(0)).numpy() for part in (wide, narrow)])
    scores = scoring.score(predictions, join(labels))
    assert scores["accuracy"] == 0.75  # of the four scored words, only the one of class 1 is wrong
    assert scores["f1"] == pytest.approx((1 + 0 + 4 / 5) / 3)


def test_regression_flattens_the_logits_of_its_one_class():
    scoring = SCORINGS["regression"]
    labels = torch.tensor([1.0, 2.0, 4.0])
    predictions = scoring.reduce(torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16), labels).numpy()
    scores = scoring.score(predictions, labels.numpy())
    assert scores["mse"] == pytest.approx(1 / 3) and scores["spearman"] == pytest.approx(1)


def test_partners_count_the_rows_whose_partner_is_nearest():
    similarity = torch.tensor([[3.0, 1.0], [2.0, 1.0]])
    found = PARTNERS.reduce(similarity, torch.arange(2)).numpy()
    assert PARTNERS.score(found, np.arange(2)) == {"accuracy": 0.5}
