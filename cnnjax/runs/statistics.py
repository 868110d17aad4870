"""What several seeds say: their mean and its interval, and whether two experiments differ. The tests are SciPy's."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from cnnjax.errors import UserError

CONFIDENCE = 0.95
POWER = 0.8  # The chance to find a difference that is there; Cohen 1988, "Statistical Power Analysis", section 2.4.
MOST_SEEDS = 10_000


class Summary(NamedTuple):
    """Of `n` values: mean, sample deviation, and the 95% interval of the mean (nan where n is 1)."""

    mean: float
    deviation: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """The mean of b minus that of a, its 95% interval, and what it takes to resolve it.

    Attributes:
      paired: whether the two share their seeds.
      resolved: whether p is below 0.05.
      more_seeds: of each experiment, to find a difference of this size with a power of 80%; 0 where it is resolved,
        None where there is no difference, or it would take more than 10,000.
    """

    paired: bool
    difference: float
    low: float
    high: float
    p_value: float
    resolved: bool
    n_a: int
    n_b: int
    more_seeds: int | None


def summarize(values: Sequence[float]) -> Summary:
    """Returns mean, deviation and Student's t interval.

    Raises:
      UserError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise UserError("`values` must hold the score of a run that ended, at least, got none.")
    mean = float(np.mean(values))
    if n == 1:
        return Summary(mean, math.nan, math.nan, math.nan, 1)
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return Summary(mean, deviation, mean - half, mean + half, n)


def compare(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Compares the scores of two experiments: paired where their seeds are the same, by Welch's test otherwise.

    Args:
      a, b: the score of each seed.

    Raises:
      UserError: one has fewer than two seeds.
    """
    for name, scores in (("a", a), ("b", b)):
        if len(scores) < 2:
            raise UserError(
                f"`{name}` must have two seeds that ended, at least, got {len(scores)}. Train more: --seeds."
            )
    paired = a.keys() == b.keys()
    x = np.array([a[seed] for seed in sorted(a)])
    y = np.array([b[seed] for seed in sorted(b)])
    difference = float(np.mean(y - x) if paired else y.mean() - x.mean())
    noise = [np.ptp(y - x)] if paired else [np.ptp(x), np.ptp(y)]
    if max(noise) <= 1e-12 * max(np.abs(x).max(), np.abs(y).max()):  # Rounding, nothing to measure the difference by.
        low = high = difference
        p_value = float(difference == 0)
    else:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # One experiment may have no noise.
            test: Any = stats.ttest_rel(y, x) if paired else stats.ttest_ind(y, x, equal_var=False)
        low, high = map(float, test.confidence_interval(CONFIDENCE))
        p_value = float(test.pvalue)
    resolved = p_value < 1 - CONFIDENCE
    more: int | None = 0
    if difference == 0:
        more = None
    elif not resolved:
        power = _paired_power(difference, y - x) if paired else _welch_power(difference, x, y)
        more = _more(power, max(len(x), len(y)))
    return Comparison(paired, difference, low, high, p_value, resolved, len(x), len(y), more)


def _more(power: Callable[[int], float], n: int) -> int | None:
    """Returns how many more than `n` it takes for the power; None beyond the limit."""
    if power(MOST_SEEDS) < POWER:
        return None
    low, high = n, MOST_SEEDS  # The power grows with n.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high - n


def _paired_power(difference: float, differences: np.ndarray) -> Callable[[int], float]:
    effect = abs(difference) / float(np.std(differences, ddof=1))
    return lambda n: _power(float(n - 1), effect * math.sqrt(n))


def _welch_power(difference: float, x: np.ndarray, y: np.ndarray) -> Callable[[int], float]:
    u, v = float(np.var(x, ddof=1)), float(np.var(y, ddof=1))

    def power(n: int) -> float:
        freedom = (u + v) ** 2 * (n - 1) / (u**2 + v**2)  # Welch and Satterthwaite's, for n of each.
        return _power(freedom, abs(difference) / math.sqrt((u + v) / n))

    return power


def _power(freedom: float, noncentrality: float) -> float:
    """Returns the chance that a two-sided t test finds the difference; Cohen 1988, section 2.5."""
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    power = float(stats.nct.sf(critical, freedom, noncentrality) + stats.nct.cdf(-critical, freedom, noncentrality))
    return 1.0 if math.isnan(power) else power  # SciPy has no digits where the effect is huge.
