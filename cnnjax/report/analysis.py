"""What the report computes: intervals, calibration, confusions, examples to show, and signs of over-fitting."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from cnnjax.runs.statistics import CONFIDENCE

NUM_BINS = 15  # Of the reliability diagram; Guo et al. 2017.
RISE = 1.05  # A validation loss that ends above its minimum by 5% counts as over-fitting, not as noise.
GAP = 0.03  # A smaller difference between the accuracies in training and validation is not worth a warning.


def wilson_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """Returns the 95% interval of an accuracy that was measured on `num_examples` images.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    from scipy.stats import binomtest

    interval = binomtest(round(accuracy * num_examples), num_examples).proportion_ci(CONFIDENCE, "wilson")
    return float(interval.low), float(interval.high)


class Calibration(NamedTuple):
    """How often predictions of a given confidence are right.

    Attributes:
      lower, upper: the bounds of each bin; a confidence belongs to the bin with lower < confidence <= upper.
      num_examples: the number of images in each bin.
      confidence: the mean confidence of each bin; nan if it is empty.
      accuracy: the fraction of each bin that is classified correctly; nan if it is empty.
      error: the expected calibration error: the mean distance of the two, weighted by the counts.
    """

    lower: Float[np.ndarray, " M"]
    upper: Float[np.ndarray, " M"]
    num_examples: Int[np.ndarray, " M"]
    confidence: Float[np.ndarray, " M"]
    accuracy: Float[np.ndarray, " M"]
    error: float

    @property
    def mean_confidence(self) -> float:
        """The mean confidence of all images."""
        return float(np.nansum(self.confidence * self.num_examples) / self.num_examples.sum())

    @property
    def mean_accuracy(self) -> float:
        """The fraction of all images that is classified correctly."""
        return float(np.nansum(self.accuracy * self.num_examples) / self.num_examples.sum())


def calibrate(
    confidence: Float[np.ndarray, " N"], correct: Bool[np.ndarray, " N"], num_bins: int = NUM_BINS
) -> Calibration:
    """Returns the calibration of predictions, in bins of equal width.

    Args:
      confidence: the probability of the predicted class.
      correct: whether it is the true class.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 2.
    """
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.searchsorted(edges[1:-1], confidence)
    count = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, confidence.astype(np.float64), num_bins) / count
        accuracy = np.bincount(index, correct.astype(np.float64), num_bins) / count
    error = float(np.nansum(np.abs(mean - accuracy) * count) / len(confidence))
    return Calibration(edges[:-1], edges[1:], count, mean, accuracy, error)


class Shown(NamedTuple):
    """A test image in the report."""

    example: int
    label: int
    predicted: int
    confidence: float


class Examples(NamedTuple):
    """The images of a class: the wrong predictions, and the right ones, that the network is most certain of."""

    label: int
    mistakes: list[Shown]
    certain: list[Shown]


def most_confident(
    probabilities: Float[np.ndarray, "N K"], label: Integer[np.ndarray, " N"], per_class: int
) -> tuple[list[Shown], dict[int, Examples]]:
    """Returns all mistakes, and the most confident examples of each class that occurs; the most confident ones first.

    Args:
      probabilities: of the network.
      label: the true classes.
      per_class: the largest number of mistakes, and of correct answers, of a class.
    """
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(label)), predicted]
    order = np.argsort(-confidence, kind="stable")
    ranked = [Shown(int(i), int(label[i]), int(predicted[i]), float(confidence[i])) for i in order]
    classes = {int(k): Examples(int(k), [], []) for k in np.unique(label)}
    for x in ranked:
        found = classes[x.label].certain if x.predicted == x.label else classes[x.label].mistakes
        if len(found) < per_class:
            found.append(x)
    return [x for x in ranked if x.predicted != x.label], classes


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


class Fit(NamedTuple):
    """What the learning curves of a run say.

    Attributes:
      lowest: the epoch with the lowest validation loss; None without validation.
      rises: whether the validation loss ends clearly above its minimum.
      over_fitted: whether it does, while the training loss has fallen since.
      gap: the accuracy in training minus that in validation at the end; None if one is missing.
    """

    lowest: int | None
    rises: bool
    over_fitted: bool
    gap: float | None


def judge_fit(history: Mapping[str, np.ndarray]) -> Fit:
    """Returns what the learning curves in the history of a run say about over-fitting."""
    gap = None
    if {"train_accuracy", "validation_accuracy"} <= history.keys():
        difference = history["train_accuracy"][-1] - history["validation_accuracy"][-1]
        gap = None if np.isnan(difference) else float(difference)
    loss = history.get("validation_loss", np.array([]))
    if not np.isfinite(loss).any():
        return Fit(None, False, False, gap)
    best = int(np.nanargmin(loss))
    rises = bool(loss[-1] > RISE * loss[best])
    learns = bool(history["train_loss"][-1] < history["train_loss"][best])
    return Fit(int(history["epoch"][best]), rises, rises and learns, gap)


class Band(NamedTuple):
    """A metric over the epochs of several seeds.

    Attributes:
      mean, low, high: the mean, the lowest and the highest value of the seeds that have reached an epoch.
    """

    epoch: Int[np.ndarray, " E"]
    mean: Float[np.ndarray, " E"]
    low: Float[np.ndarray, " E"]
    high: Float[np.ndarray, " E"]


def band(histories: Sequence[Mapping[str, np.ndarray]], metric: str) -> Band | None:
    """Returns a metric over the epochs of several runs, or None if no run has it."""
    values: dict[int, list[float]] = {}
    for history in histories:
        for epoch, value in zip(history.get("epoch", ()), history.get(metric, ()), strict=False):
            if np.isfinite(value):
                values.setdefault(int(epoch), []).append(float(value))
    if not values:
        return None
    epochs = sorted(values)
    rows = [values[epoch] for epoch in epochs]
    return Band(np.array(epochs), *(np.array([float(of(row)) for row in rows]) for of in (np.mean, np.min, np.max)))


def differing(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the values that are not the same in all of several flat dicts: {name: value of each}."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name) for column in columns] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
