import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cnnjax.errors import UserError
from cnnjax.runs.statistics import compare, summarize


def scores_of(values, first_seed=0):
    return {first_seed + i: float(value) for i, value in enumerate(values)}


def with_moments(n, mean, deviation):
    """n values of exactly this mean and sample deviation, up to rounding."""
    values = np.arange(n) - (n - 1) / 2
    return mean + deviation * values / values.std(ddof=1)


def test_summary_by_hand():
    # t(0.975, 2) = 4.302653 in the tables; the half-width is t * s / sqrt(n).
    summary = summarize([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert summary == pytest.approx((2.0, 1.0, 2 - half, 2 + half, 3), rel=1e-6)


def test_summary_of_one_value_has_no_spread():
    summary = summarize([0.9])
    assert (summary.mean, summary.n) == (0.9, 1)
    assert all(math.isnan(value) for value in (summary.deviation, summary.low, summary.high))


def test_summary_of_equal_values():
    assert summarize([0.5, 0.5, 0.5]) == (0.5, 0.0, 0.5, 0.5, 3)


def test_summary_of_nothing():
    with pytest.raises(UserError, match=r"`values` must hold .* got none"):
        summarize([])


def test_same_seeds_are_paired_by_seed_in_any_order():
    # The differences are 1, 2, 3: t = 2 / (1 / sqrt(3)); for two degrees of freedom p = 1 - t / sqrt(t² + 2).
    comparison = compare({0: 10.0, 1: 20.0, 2: 30.0}, {2: 33.0, 0: 11.0, 1: 22.0})
    t, half = 2 * math.sqrt(3), 4.302653 / math.sqrt(3)
    assert comparison.paired and not comparison.resolved
    assert comparison[1:5] == pytest.approx((2.0, 2 - half, 2 + half, 1 - t / math.sqrt(t**2 + 2)), rel=1e-6)
    assert (comparison.n_a, comparison.n_b) == (3, 3)


def test_difference_is_b_minus_a():
    a, b = scores_of([1.0, 2.0, 4.0]), scores_of([2.0, 5.0, 4.0])
    there, back = compare(a, b), compare(b, a)
    assert there.difference == pytest.approx(4 / 3)
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))
    assert (back.p_value, back.more_seeds) == (pytest.approx(there.p_value), there.more_seeds)


@pytest.mark.parametrize("first_seed", [1, 100])  # Overlapping seeds are not the same seeds.
def test_other_seeds_are_compared_by_welch(first_seed):
    # Variances 1 and 4, n 3 each: the standard error is sqrt(5/3), the freedom (5/3)² / ((1/9 + 16/9) / 2) = 50/17.
    comparison = compare(scores_of([1, 2, 3]), scores_of([4, 6, 8], first_seed))
    error, freedom = math.sqrt(5 / 3), 50 / 17
    half = scipy_stats.t.ppf(0.975, freedom) * error
    assert not comparison.paired
    assert comparison[1:5] == pytest.approx((4.0, 4 - half, 4 + half, 2 * scipy_stats.t.sf(4 / error, freedom)))


def test_numbers_of_seeds_may_differ():
    comparison = compare(scores_of([1, 2, 3, 4]), scores_of([2, 3]))
    assert (comparison.paired, comparison.n_a, comparison.n_b) == (False, 4, 2)
    assert comparison.difference == pytest.approx(0.0)


def test_a_clear_difference_needs_no_more_seeds():
    comparison = compare(scores_of([0.90, 0.91, 0.92]), scores_of([0.95, 0.961, 0.969]))
    assert comparison.resolved and comparison.p_value < 0.05
    assert comparison.low > 0 and comparison.more_seeds == 0


def test_more_seeds_of_a_pair_from_the_textbook():
    # An effect of half a deviation takes 34 pairs for a power of 80% at the two-sided 5% level; Cohen 1988, chapter 2.
    comparison = compare(scores_of(np.zeros(10)), scores_of(with_moments(10, mean=0.5, deviation=1.0)))
    assert comparison.paired and not comparison.resolved
    assert comparison.more_seeds == 34 - 10


@pytest.mark.parametrize("n_b", [5, 10])  # Both must reach 64; what is missing counts from the larger.
def test_more_seeds_by_welch_from_the_textbook(n_b):
    # An effect of half a deviation takes 64 of each; Cohen 1988, table 2.4.1.
    a, b = scores_of(with_moments(10, 0.0, 1.0)), scores_of(with_moments(n_b, 0.5, 1.0), first_seed=100)
    comparison = compare(a, b)
    assert not comparison.paired and not comparison.resolved
    assert comparison.more_seeds == 64 - 10


def test_more_seeds_reach_the_power_in_simulation():
    # Unequal variances, where no table helps: the n that is promised finds the difference in 80% of 20,000 draws.
    a, b = with_moments(6, 0.0, 1.0), with_moments(6, 1.0, 2.0)
    more = compare(scores_of(a), scores_of(b, first_seed=100)).more_seeds
    assert more is not None
    rng, shape = np.random.default_rng(0), (20_000, 6 + more)
    test = scipy_stats.ttest_ind(rng.normal(1, 2, shape), rng.normal(0, 1, shape), axis=1, equal_var=False)
    assert np.mean(test.pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_an_unresolved_difference_takes_one_more_seed_at_least():
    # p is 0.074 with three pairs, of an effect so large that the fourth has the power.
    comparison = compare(scores_of(np.zeros(3)), scores_of([1.0, 2.0, 3.0]))
    assert not comparison.resolved and comparison.more_seeds is not None and comparison.more_seeds >= 1


@pytest.mark.parametrize("first_seed", [0, 100])
def test_a_difference_that_takes_too_many_seeds(first_seed):
    a, b = with_moments(8, 0.0, 1.0), with_moments(8, 1e-3, 1.0)[::-1]
    assert compare(scores_of(a), scores_of(b, first_seed)).more_seeds is None


@pytest.mark.parametrize("first_seed", [0, 100])
def test_no_difference_takes_no_number_of_seeds(first_seed):
    comparison = compare(scores_of([1.0, 2.0, 3.0]), scores_of([3.0, 2.0, 1.0], first_seed))
    assert (comparison.difference, comparison.resolved, comparison.more_seeds) == (0.0, False, None)


@pytest.mark.parametrize("first_seed", [0, 100])
def test_equal_scores_without_noise(first_seed):
    comparison = compare(scores_of([0.5, 0.5, 0.5]), scores_of([0.5, 0.5, 0.5], first_seed))
    assert comparison == (first_seed == 0, 0.0, 0.0, 0.0, 1.0, False, 3, 3, None)


@pytest.mark.parametrize("first_seed", [0, 100])
def test_other_scores_without_noise(first_seed):
    comparison = compare(scores_of([0.5, 0.5, 0.5]), scores_of([0.75, 0.75, 0.75], first_seed))
    assert comparison == (first_seed == 0, 0.25, 0.25, 0.25, 0.0, True, 3, 3, 0)


def test_equal_differences_of_noisy_scores():
    comparison = compare(scores_of([0.25, 0.5, 0.625]), scores_of([0.375, 0.625, 0.75]))
    assert comparison == (True, 0.125, 0.125, 0.125, 0.0, True, 3, 3, 0)


def test_equal_differences_up_to_rounding():
    # 0.93 - 0.92 and 0.92 - 0.91 are not the same double: what differs is rounding, and no noise.
    comparison = compare(scores_of([0.91, 0.92, 0.93]), scores_of([0.92, 0.93, 0.94]))
    assert comparison[1:6] == (pytest.approx(0.01), pytest.approx(0.01), pytest.approx(0.01), pytest.approx(0.0), True)


def test_noise_of_one_experiment_alone():
    comparison = compare(scores_of([0.5, 0.5, 0.5]), scores_of([0.4, 0.5, 0.7], first_seed=100))
    assert not comparison.resolved
    assert comparison.p_value == pytest.approx(scipy_stats.ttest_1samp([0.4, 0.5, 0.7], 0.5).pvalue)


@pytest.mark.parametrize("few", [{}, {0: 0.9}])
def test_two_seeds_at_least(few):
    two = {0: 0.9, 1: 0.8}
    with pytest.raises(UserError, match=rf"`a` must have two seeds .* got {len(few)}.*--seeds"):
        compare(few, two)
    with pytest.raises(UserError, match=rf"`b` must have two seeds .* got {len(few)}.*--seeds"):
        compare(two, few)
