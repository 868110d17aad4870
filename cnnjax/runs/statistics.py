"""Statistics over seeds, by SciPy and in words: the mean with its interval, and the comparison of two experiments."""

import bisect
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from cnnjax.errors import UserError, check
from cnnjax.process.tables import show_score

CONFIDENCE = 0.95
POWER = 0.8  # The probability of detecting a real difference; Cohen 1988, "Statistical Power Analysis", section 2.4.
MAX_MORE_SEEDS = 10_000
METRICS = (
    "test_accuracy",
    "test_balanced_accuracy",
    "test_loss",
    "test_macro_precision",
    "test_macro_recall",
    "test_macro_f1",
    "best_validation_accuracy",
    "best_validation_balanced_accuracy",
    "best_validation_loss",
)
LOSSES = ("test_loss", "best_validation_loss")
CLASS_METRICS = ("precision", "recall", "f1")  # Of a class: recall:CLASS.
UNBOUNDED = (-math.inf, math.inf)


class Summary(NamedTuple):
    """The mean, sample standard deviation and 95% interval of the mean of `n` values.

    The deviation is NaN if n is 1. The interval is NaN if n is 1 or all values are equal: then the noise is unknown.
    """

    mean: float
    deviation: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """The mean of b minus the mean of a, with its 95% interval.

    If the scores have no noise, it is unknown how much other seeds or test images would change the difference: interval
    and p are NaN, and the difference is not resolved.

    Attributes:
      paired: whether both have the same seeds.
      resolved: whether p, corrected if there are several comparisons, is below 0.05.
      more: the numbers of seeds to add to a and to b so that a difference of this size is detected with a probability
        of 80%; (0, 0) if it is resolved, None if there is no difference or no noise, one of them would have more than
        10,000, or there are several comparisons.
      corrected: p corrected for the number of `comparisons`, see `compare_all`.
    """

    paired: bool
    difference: float
    low: float
    high: float
    p_value: float
    resolved: bool
    n_a: int
    n_b: int
    more: tuple[int, int] | None
    corrected: float = math.nan
    comparisons: int = 1


def summarize(values: Sequence[float], bounds: tuple[float, float] = UNBOUNDED) -> Summary:
    """Returns the mean, the standard deviation and Student's t interval.

    Args:
      values: the score of each seed.
      bounds: the least and the greatest possible score, which limit the interval.

    Raises:
      UserError: if there are no values, or one is not finite.
    """
    from scipy import stats  # Its import takes half a second.

    n = len(values)
    if n == 0:
        raise UserError("`values` must contain the score of at least one finished run, got none.")
    check("values", "finite", bool(np.isfinite(values).all()), values)
    mean = float(np.mean(values))
    if n == 1:
        return Summary(mean, math.nan, math.nan, math.nan, 1)
    if np.ptp(values) == 0:
        return Summary(mean, 0.0, math.nan, math.nan, n)
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return Summary(mean, deviation, max(mean - half, bounds[0]), min(mean + half, bounds[1]), n)


def compare(
    a: Mapping[int, float],
    b: Mapping[int, float],
    bounds: tuple[float, float] = UNBOUNDED,
    names: tuple[str, str] = ("a", "b"),
    *,
    alone: bool = True,
) -> Comparison:
    """Compares two experiments with the paired t test if they have the same seeds, and with Welch's test otherwise.

    Args:
      a, b: the score of each seed.
      bounds: the least and the greatest possible score. Their distance limits the interval of the difference.
      names: of the experiments, for messages.
      alone: whether this is the only comparison, for which `more` is computed.

    Raises:
      UserError: if one has fewer than two seeds, or a score is not finite.
    """
    from scipy import stats

    for name, scores in zip(names, (a, b), strict=True):
        if len(scores) < 2:
            raise UserError(f"`{name}` must have at least two finished seeds, got {len(scores)}. Train more: --seeds.")
        check(name, "finite scores", bool(np.isfinite([*scores.values()]).all()), [*scores.values()])
    paired = a.keys() == b.keys()
    x = np.array([a[seed] for seed in sorted(a)])
    y = np.array([b[seed] for seed in sorted(b)])
    difference = float(np.mean(y - x) if paired else y.mean() - x.mean())
    samples = [y - x] if paired else [x, y]
    sizes = (len(x), len(y))
    if max(map(np.ptp, samples)) <= 1e-12 * max(np.abs(x).max(), np.abs(y).max()):  # No noise except rounding.
        return Comparison(paired, difference, math.nan, math.nan, math.nan, False, *sizes, None)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # One experiment may have no noise.
        test: Any = stats.ttest_rel(y, x) if paired else stats.ttest_ind(y, x, equal_var=False)
    low, high = map(float, test.confidence_interval(CONFIDENCE))
    p_value = float(test.pvalue)
    resolved = p_value < 1 - CONFIDENCE
    limit = bounds[1] - bounds[0]
    low, high = max(low, -limit), min(high, limit)
    more = None if difference == 0 or not alone else (0, 0) if resolved else _more_seeds(difference, samples, sizes)
    return Comparison(paired, difference, low, high, p_value, resolved, *sizes, more)


def compare_all(
    scores: Mapping[str, Mapping[int, float]], bounds: tuple[float, float] = UNBOUNDED
) -> dict[tuple[str, str], Comparison]:
    """Compares every pair of experiments, and corrects p for the number of comparisons.

    A difference is resolved if its corrected p is below 0.05: then with a probability of at least 95% none is called
    resolved by chance.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Args:
      scores: for each experiment, the score of each seed.
      bounds: see `compare`.
    """
    pairs, alone = [*combinations(scores, 2)], len(scores) == 2
    found = {(a, b): compare(scores[a], scores[b], bounds, (a, b), alone=alone) for a, b in pairs}
    tested = sorted((c.p_value, pair) for pair, c in found.items() if not math.isnan(c.p_value))
    largest = 0.0
    for i, (p_value, pair) in enumerate(tested):
        largest = max(largest, min(1.0, (len(pairs) - i) * p_value))
        resolved = largest < 1 - CONFIDENCE
        found[pair] = found[pair]._replace(corrected=largest, comparisons=len(pairs), resolved=resolved)
    return found


def _more_seeds(difference: float, samples: Sequence[np.ndarray], sizes: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the numbers of seeds to add: the fewest so that both experiments have m, and the power is `POWER`.

    Args:
      difference: the true difference.
      samples: the differences of the pairs, or the scores of both experiments. Their variances stand for the true ones.
      sizes: the numbers of seeds.

    Returns:
      The numbers, or None if m would be more than `MAX_MORE_SEEDS`.
    """
    from scipy import stats

    variances = np.array([np.var(sample, ddof=1) for sample in samples])

    def power(m: int) -> float:
        """Returns the power of a two-sided t test; Cohen 1988, section 2.5."""
        n = np.maximum(sizes[: len(samples)], m)
        squares = variances / n  # The squares of the standard errors.
        freedom = np.sum(squares) ** 2 / np.sum(squares**2 / (n - 1))  # Welch and Satterthwaite's; n - 1 for pairs.
        noncentrality = abs(difference) / math.sqrt(np.sum(squares))
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
        power = float(stats.nct.sf(critical, freedom, noncentrality) + stats.nct.cdf(-critical, freedom, noncentrality))
        return 1.0 if math.isnan(power) else power  # SciPy returns NaN if the effect is huge.

    candidates = range(min(sizes) + 1, MAX_MORE_SEEDS + 1)
    index = bisect.bisect_left(candidates, POWER, key=power)  # The power grows with m.
    if index == len(candidates):
        return None
    more_a, more_b = (max(0, candidates[index] - n) for n in sizes)
    return more_a, more_b


def wilson_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """Returns the 95% interval of an accuracy that was measured on `num_examples` images.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    from scipy.stats import binomtest

    interval = binomtest(round(accuracy * num_examples), num_examples).proportion_ci(CONFIDENCE, "wilson")
    return float(interval.low), float(interval.high)


def difference_interval(a: float, num_a: int, b: float, num_b: int) -> tuple[float, float]:
    """Returns the 95% interval of `a` minus `b`, accuracies on independent sets of `num_a` and `num_b` images.

    Source: Newcombe, "Interval estimation for the difference between independent proportions" (1998), method 10.
    """
    (low_a, high_a), (low_b, high_b) = wilson_interval(a, num_a), wilson_interval(b, num_b)
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


def verdicts(
    scores: Mapping[str, Mapping[int, float]], metric: str = "test_accuracy"
) -> dict[tuple[str, str], list[str]]:
    """Returns for every pair of experiments their difference and whether it is resolved, in words.

    Args:
      scores: for each experiment, the score of each seed.

    Raises:
      UserError: see `compare`.
    """
    found = compare_all(scores, _bounds(metric))
    return {pair: _verdict(pair, comparison, metric) for pair, comparison in found.items()}


def _verdict(names: tuple[str, str], c: Comparison, metric: str) -> list[str]:
    test = "paired t test, the same seeds" if c.paired else "Welch's t test"
    in_points = _is_fraction(metric)
    digits = 2 if in_points else 4
    size, low, high = (f"{value * (100 if in_points else 1):+.{digits}f}" for value in (c.difference, c.low, c.high))
    difference = f"{names[1]} minus {names[0]}: {size}{' points' if in_points else ''}"
    if math.isnan(c.p_value):
        same = "All pairs of the same seed differ by this" if c.paired else "All seeds of an experiment score the same"
        why = f"{same}, so the test set is too small, or there are too few seeds, to estimate the noise."
        return [f"{difference}.", f"The difference is not resolved. {why}" if c.difference else "The means are equal."]
    difference += f" (95% interval {low} to {high}), p = {c.p_value:.2g} ({test})"
    difference += f", {c.corrected:.2g} corrected for {c.comparisons} comparisons." if c.comparisons > 1 else "."
    if c.resolved:
        better = (c.difference > 0) == (metric not in LOSSES)
        how = "better" if metric in LOSSES or in_points else "higher"  # Of a user's own score we cannot know.
        return [difference, f"The difference is resolved: {names[better]} is {how}."]
    if c.difference == 0:
        return [difference, "The means are equal."]
    if c.comparisons > 1:
        return [difference, "The difference is not resolved. Train more seeds, or compare fewer experiments."]
    if c.more is None:
        rest = f"and more than {MAX_MORE_SEEDS:,} seeds of each would not resolve one of its size."
        return [difference, f"The difference is not resolved, {rest}"]
    counts = [(count, name) for count, name in zip(c.more, names, strict=True) if count]
    more = " and ".join(f"{count} more {'seed' if count == 1 else 'seeds'} of {name}" for count, name in counts)
    return [
        difference,
        f"The difference is not resolved. One of this size would take about {more} (for a probability of 80% of "
        "detecting it).",
    ]


def describe(values: list[float], metric: str = "test_accuracy") -> str:
    """Returns mean, deviation, 95% interval and n, in words."""
    if not np.isfinite(values).all():
        return f"{metric} {', '.join(_show(value, metric) for value in values)} (not finite)"
    s = summarize(values, bounds=_bounds(metric))
    if s.n == 1:
        return f"{metric} {_show(s.mean, metric)} (one seed)"
    if s.deviation == 0:
        return f"{metric} {_show(s.mean, metric)}, the same for all {s.n} seeds, so that its noise is unknown"
    return (
        f"{metric} {_show(s.mean, metric)} ± {_show(s.deviation, metric)} (sample deviation), 95% interval of the mean "
        f"{_show(s.low, metric)} to {_show(s.high, metric)}, n = {s.n}"
    )


def _is_fraction(metric: str) -> bool:
    """Returns whether a metric is between 0 and 1, as all of ours are except the loss."""
    return (metric in METRICS and metric not in LOSSES) or metric.partition(":")[0] in CLASS_METRICS


def _bounds(metric: str) -> tuple[float, float]:
    return (0.0, math.inf) if metric in LOSSES else (0.0, 1.0) if _is_fraction(metric) else UNBOUNDED


def _show(value: float, metric: str) -> str:
    if metric in LOSSES:
        return f"{value:z.4f}"
    return f"{value:.2%}" if _is_fraction(metric) else show_score(value)
