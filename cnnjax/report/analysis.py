"""Computes the content of a report: examples, signs of over-fitting, and the differences between runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from cnnjax.class_scores import DIGITS
from cnnjax.runs.statistics import difference_interval

RISE, MARGIN = 1.05, 0.005  # A validation loss above its minimum by 5%, and by 0.005, has risen.
FALL = 0.01  # A training loss that changes by a smaller fraction has neither fallen nor risen.
GAP = 0.03  # A smaller difference between the accuracies in training and validation is not worth a warning.


class Shown(NamedTuple):
    """A test image in the report."""

    example: int
    label: int
    predicted: int
    confidence: float


class ClassExamples(NamedTuple):
    """The images of a class: the wrong predictions, and the right ones, that the network is most certain of."""

    mistakes: list[Shown]
    certain: list[Shown]


def most_confident(
    probabilities: Float[np.ndarray, "N K"], label: Integer[np.ndarray, " N"], per_class: int
) -> tuple[list[Shown], dict[int, ClassExamples]]:
    """Returns all mistakes, and the most confident examples of each class that occurs; the most confident ones first.

    Args:
      probabilities: of the network.
      label: the true classes.
      per_class: the largest number of mistakes, and of correct answers, of a class.
    """
    predicted = probabilities.argmax(axis=1)
    confidence = np.round(probabilities[np.arange(len(label)), predicted], DIGITS)
    order = np.argsort(-confidence, kind="stable")
    ranked = [Shown(int(i), int(label[i]), int(predicted[i]), float(confidence[i])) for i in order]
    classes = {int(k): ClassExamples([], []) for k in np.unique(label)}
    for x in ranked:
        found = classes[x.label].certain if x.predicted == x.label else classes[x.label].mistakes
        if len(found) < per_class:
            found.append(x)
    return [x for x in ranked if x.predicted != x.label], classes


class Fit(NamedTuple):
    """The findings from the learning curves of a run.

    Attributes:
      lowest: the epoch with the lowest validation loss; None without validation.
      above: whether the validation loss ends above its minimum by `RISE` and `MARGIN`.
      rises: whether it does for more than one epoch, and does not recover.
      over_fitted: whether it rises, while the training loss has fallen since.
      flat: whether the training loss has hardly fallen since the first epoch.
      gap: the accuracy in training minus that in validation at the end; None if one is missing.
      chance: the 95% interval of the gap, if it includes 0; else None. Then there are too few images to tell the gap
        from chance.
    """

    lowest: int | None
    above: bool
    rises: bool
    over_fitted: bool
    flat: bool
    gap: float | None
    chance: tuple[float, float] | None


def judge_fit(
    history: Mapping[str, np.ndarray], num_train_examples: int | None = None, num_validation_examples: int | None = None
) -> Fit:
    """Returns what the learning curves in the history of a run say about over-fitting.

    Args:
      history: the metrics of at least one epoch.
      num_train_examples, num_validation_examples: tell a gap from chance; None if they are not known. With balanced
        sampling, in which images repeat, the interval is too narrow.
    """
    gap = chance = None
    if {"train_accuracy", "validation_accuracy"} <= history.keys():
        train, validation = (float(history[f"{part}_accuracy"][-1]) for part in ("train", "validation"))
        gap = None if np.isnan(train - validation) else train - validation
        if gap is not None and num_train_examples and num_validation_examples:
            low, high = difference_interval(train, num_train_examples, validation, num_validation_examples)
            chance = (low, high) if low <= 0 <= high else None
    train_loss = history["train_loss"]
    flat = len(train_loss) > 1 and bool(train_loss[0] - np.nanmin(train_loss[1:]) < FALL * abs(train_loss[0]))
    loss = history.get("validation_loss", np.array([]))
    if not np.isfinite(loss).any():
        return Fit(None, False, False, False, flat, gap, chance)
    best = int(np.nanargmin(loss))
    bound = max(RISE * loss[best], loss[best] + MARGIN)
    last = loss[-3:]
    above = bool(loss[-1] > bound)
    recovers = bool((np.diff(last) < 0).all() and 2 * last[-1] - last[-2] <= bound) if len(last) > 1 else False
    rises = above and len(loss) - best > 2 and bool(np.median(last) > bound) and not recovers
    learns = bool(train_loss[-1] < train_loss[best])
    return Fit(int(history["epoch"][best]), above, rises, rises and learns and not flat, flat, gap, chance)


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
    bounds = (np.array([float(reduce(row)) for row in rows]) for reduce in (np.mean, np.min, np.max))
    return Band(np.array(epochs), *bounds)


def differing(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the values that are not the same in all of several flat dicts: {name: value of each}."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name) for column in columns] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
