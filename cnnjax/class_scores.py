"""Scores of the classes, frequent mistakes, the calibration of predictions, and which scores are the user's own."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

Confusion = dict[tuple[int, int], int]  # {(true, predicted): count}, without the pairs that never occur.

MAX_CLASSES = 300  # The confusion matrix in result.json then has 90,000 numbers.
UNEVEN = 1.5  # MNIST, whose largest class has 1.27 times the test images of its smallest, counts as even.
NUM_BINS = 15  # Bins of a calibration curve; Guo et al. 2017.
DIGITS = 5  # A confidence is rounded, so that batches of another size give the same order and bins.


OUR_SCORES = ("loss", "accuracy", "balanced_accuracy")  # Of a validation set, in the order of a row of metrics.jsonl.


def own_scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scores of `Config.metrics` in a row of metrics.jsonl, or in a history, by their names."""
    values = {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}
    return {name: value for name, value in values.items() if name not in OUR_SCORES}


class ClassScores(NamedTuple):
    """Scores of K classes.

    Attributes:
      num_examples: of each class.
      precision: the correct fraction of the predictions of a class; 0 for a class that is never predicted.
      recall: the correct fraction of the examples of a class; nan for a class without examples.
      f1: the harmonic mean of the two, 0 if both are 0; nan for a class without examples.

    Source: scikit-learn's `precision_recall_fscore_support` with zero_division=0, except for classes without examples.
    """

    num_examples: Int[np.ndarray, " K"]
    precision: Float[np.ndarray, " K"]
    recall: Float[np.ndarray, " K"]
    f1: Float[np.ndarray, " K"]

    def means(self) -> dict[str, float]:
        """Returns the macro means, over the classes that have examples. That of "recall" is the balanced accuracy."""
        occurs = self.num_examples > 0
        return {name: fmean(getattr(self, name)[occurs].tolist()) for name in ("precision", "recall", "f1")}

    def rows(self, names: Sequence[str]) -> list[Any]:
        """Returns a row per class, {"name", "count", "precision", "recall", "f1"}, with None instead of nan."""
        keys = ("name", "count", "precision", "recall", "f1")
        columns = [[None if math.isnan(x) else x for x in values.tolist()] for values in self]
        return [dict(zip(keys, row, strict=True)) for row in zip(names, *columns, strict=True)]


def count_pairs(label: Integer[np.ndarray, " N"], predicted: Integer[np.ndarray, " N"]) -> Confusion:
    """Returns the number of examples of each pair (true class, predicted class). Classes are below 2**31."""
    pairs, counts = np.unique(label.astype(np.int64) << 32 | predicted.astype(np.int64), return_counts=True)
    return {(pair >> 32, pair & 2**32 - 1): count for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)}


def class_scores(confusion: Confusion, num_classes: int) -> ClassScores:
    """Returns the scores of each class."""
    label, predicted = np.array([*confusion], np.int64).reshape(-1, 2).T
    counts = np.array([*confusion.values()], np.int64)
    of_label, of_predicted, correct = np.zeros((3, num_classes), np.int64)
    np.add.at(of_label, label, counts)
    np.add.at(of_predicted, predicted, counts)
    np.add.at(correct, label, np.where(label == predicted, counts, 0))
    precision = correct / np.maximum(of_predicted, 1)
    recall, f1 = (
        np.where(of_label > 0, correct / np.maximum(n, 1), np.nan) for n in (of_label, (of_label + of_predicted) / 2)
    )
    return ClassScores(of_label, precision, recall, f1)


def confusion_matrix(confusion: Confusion, num_classes: int) -> list[list[int]] | None:
    """Returns the counts as rows of true classes, K by K, or None if K is above `MAX_CLASSES`."""
    if num_classes > MAX_CLASSES:
        return None
    return [[confusion.get((i, j), 0) for j in range(num_classes)] for i in range(num_classes)]


def is_uneven(counts: Sequence[int]) -> bool:
    """Returns whether the largest class has more than 1.5 times the examples of the smallest that has any."""
    present = [count for count in counts if count]
    return bool(present) and max(present) > UNEVEN * min(present)


class Confused(NamedTuple):
    """A number of test images of a class, `label`, that were predicted as another one."""

    label: int
    predicted: int
    num_examples: int


def top_confusions(matrix: Sequence[Sequence[int]], limit: int) -> list[Confused]:
    """Returns the most frequent kinds of mistakes.

    Args:
      matrix: the counts, with true classes as rows.
    """
    counts = np.array(matrix)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:limit]
    pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [Confused(int(i), int(j), int(counts[i, j])) for i, j in pairs if counts[i, j]]


class Calibration(NamedTuple):
    """How often predictions of a given confidence are right.

    Attributes:
      lower, upper: the bounds of each bin; a confidence belongs to the bin with lower < confidence <= upper.
      num_examples: the number of images in each bin.
      confidence: the mean confidence of each bin; nan if it is empty.
      accuracy: the fraction of each bin that is classified correctly; nan if it is empty.
      error: the expected calibration error: the mean distance of the two, weighted by the counts.
      by_chance: about the error of a perfectly calibrated network with these confidences, on as many images.
      mean_confidence: of all images.
      mean_accuracy: the fraction of all images that is classified correctly.
      deviation: the standard deviation of `mean_accuracy` for a perfectly calibrated network with these confidences.
    """

    lower: Float[np.ndarray, " M"]
    upper: Float[np.ndarray, " M"]
    num_examples: Int[np.ndarray, " M"]
    confidence: Float[np.ndarray, " M"]
    accuracy: Float[np.ndarray, " M"]
    error: float
    by_chance: float
    mean_confidence: float
    mean_accuracy: float
    deviation: float


def calibrate(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], num_bins: int = NUM_BINS
) -> Calibration:
    """Returns the calibration of predictions, in bins of equal width.

    Args:
      confidence: the probability of the predicted class, which is rounded to `DIGITS`.
      correct: whether it is the true class.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 2.
    """
    confidence = confidence.astype(np.float64).round(DIGITS)  # In float32, 0.4 is above the edge 0.4.
    edges, n = np.linspace(0, 1, num_bins + 1), len(confidence)
    index = np.searchsorted(edges[1:-1], confidence)
    count = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, confidence, num_bins) / count
        accuracy = np.bincount(index, correct.astype(np.float64), num_bins) / count
    error = np.nansum(np.abs(mean - accuracy) * count) / n
    variance = np.bincount(index, confidence * (1 - confidence), num_bins)  # Variance of the number correct.
    by_chance = math.sqrt(2 / math.pi) * np.sqrt(variance).sum() / n  # The mean distance of a normal distribution.
    scores = error, by_chance, confidence.mean(), correct.mean(), math.sqrt(variance.sum()) / n
    return Calibration(edges[:-1], edges[1:], count, mean, accuracy, *map(float, scores))
