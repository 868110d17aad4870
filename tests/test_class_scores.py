import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support
from sklearn.metrics import confusion_matrix as reference_matrix

from cnnjax.class_scores import MAX_CLASSES, class_scores, confusion_matrix, count_pairs, is_uneven
from cnnjax.metrics import Scores


def random_predictions(seed):
    """1,000 labels and predictions of 12 uneven classes: 3 is never predicted, and 5, 7 and 11 have no examples."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=12) * ~np.isin(np.arange(12), (5, 7, 11))
    label = rng.choice(12, 1000, p=weights / weights.sum())
    predicted = np.where(rng.random(1000) < 0.6, label, rng.choice(11, 1000))  # Of 5 and 7, but not of 11.
    return label.astype(np.uint8), np.where(predicted == 3, 4, predicted).astype(np.int32)


@pytest.mark.parametrize("seed", range(5))
def test_the_scores_of_classes_equal_those_of_scikit_learn(seed):
    label, predicted = random_predictions(seed)
    confusion = count_pairs(label, predicted)
    found = class_scores(confusion, 12)
    names, occurs = [*range(12)], np.bincount(label, minlength=12) > 0
    assert confusion_matrix(confusion, 12) == reference_matrix(label, predicted, labels=names).tolist()
    precision, recall, f1, count = precision_recall_fscore_support(label, predicted, labels=names, zero_division=0)
    np.testing.assert_array_equal(found.num_examples, count)
    np.testing.assert_allclose(found.precision, precision, rtol=1e-14)
    np.testing.assert_allclose(found.recall, np.where(occurs, recall, np.nan), rtol=1e-14)
    np.testing.assert_allclose(found.f1, np.where(occurs, f1, np.nan), rtol=1e-14)
    assert np.isnan(found.recall[[5, 7, 11]]).all() and found.precision[[3, 5, 7, 11]].tolist() == [0, 0, 0, 0]
    *macro, _ = precision_recall_fscore_support(
        label, predicted, labels=np.flatnonzero(occurs), zero_division=0, average="macro"
    )
    assert [*found.means().values()] == pytest.approx(macro, rel=1e-14)
    scores = Scores(0.5, 1000, {}, confusion)
    with np.errstate(all="raise"):
        balanced = scores.balanced_accuracy
    assert balanced == pytest.approx(reference_balanced_accuracy(label, predicted), rel=1e-14)


def reference_balanced_accuracy(label, predicted):
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        return balanced_accuracy_score(label, predicted)


def test_rows_have_names_and_no_nan():
    rows = class_scores({(0, 0): 3, (0, 1): 1, (2, 0): 2}, 3).rows(("猫", "none", "c"))
    assert rows == [
        {"name": "猫", "count": 4, "precision": 0.6, "recall": 0.75, "f1": pytest.approx(2 / 3)},
        {"name": "none", "count": 0, "precision": 0.0, "recall": None, "f1": None},
        {"name": "c", "count": 2, "precision": 0.0, "recall": 0.0, "f1": 0.0},
    ]


def test_a_million_classes_need_no_matrix():
    num_classes = 2**20
    label = np.arange(0, num_classes, 3)
    confusion = count_pairs(label, np.where(label % 2, label, num_classes - 1))
    assert confusion[3, 3] == 1 and confusion[0, num_classes - 1] == 1 and len(confusion) == len(label)
    found = class_scores(confusion, num_classes)
    assert found.means()["recall"] == np.mean(label % 2)
    assert found.precision[-1] == pytest.approx(1 / (1 + sum(label % 2 == 0))) and math.isnan(found.recall[1])
    assert confusion_matrix(confusion, MAX_CLASSES + 1) is None


def test_scores_of_training_have_no_balanced_accuracy():
    with pytest.raises(ValueError, match="`scores` must be those of an evaluation to have a balanced accuracy, got"):
        _ = Scores(0.5, 2, {"accuracy": 0.5}).balanced_accuracy


def test_classes_are_uneven_if_the_largest_has_more_than_one_and_a_half_times_the_smallest():
    assert [is_uneven(counts) for counts in ([892, 1135], [2, 3], [2, 4], [0, 1], [0, 2, 4], [5])] == [
        False, False, True, False, True, False,
    ]  # fmt: skip
