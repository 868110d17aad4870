import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cnnjax.errors import UserError
from cnnjax.runs.statistics import compare, compare_all, describe, summarize, verdicts


def scores_of(values, first_seed=0):
    return {first_seed + i: float(value) for i, value in enumerate(values)}


def verdict(a, b):
    return verdicts({"a": a, "b": b})["a", "b"]


def with_moments(n, mean, deviation):
    """Returns n values with this mean and sample standard deviation, up to rounding."""
    values = np.arange(n) - (n - 1) / 2
    return mean + deviation * values / values.std(ddof=1)


def test_summary_by_hand():
    # From tables, t(0.975, 2) = 4.302653. The half-width is t * s / sqrt(n).
    summary = summarize([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert summary == pytest.approx((2.0, 1.0, 2 - half, 2 + half, 3), rel=1e-6)


def test_summary_of_one_value_has_no_spread():
    summary = summarize([0.9])
    assert (summary.mean, summary.n) == (0.9, 1)
    assert all(math.isnan(value) for value in (summary.deviation, summary.low, summary.high))


def test_summary_of_equal_values_has_no_interval():
    assert summarize([0.9, 0.9, 0.9]) == pytest.approx((0.9, 0.0, math.nan, math.nan, 3), nan_ok=True)
    assert describe([0.9, 0.9, 0.9]) == "test_accuracy 90.00%, the same for all 3 seeds, so that its noise is unknown"


def test_intervals_stay_within_the_possible_scores():
    # The half-width is t * s / sqrt(n); without bounds 0.95 ± 12.7062 * 0.05 and 0.5 ± 12.7062 * 0.5.
    assert summarize([0.9, 1.0], bounds=(0.0, 1.0))[2:4] == pytest.approx((0.95 - 12.7062 * 0.05, 1.0), rel=1e-5)
    assert summarize([0.0, 1.0], bounds=(0.0, math.inf))[2:4] == pytest.approx((0.0, 0.5 + 12.7062 * 0.5), rel=1e-5)
    a = scores_of([0.2, 0.9])
    for first_seed in (0, 100):
        b = scores_of([0.9, 0.2], first_seed)
        assert compare(a, b, bounds=(0.0, 1.0))[1:4] == (0.0, -1.0, 1.0)
        assert compare(a, b, bounds=(0.0, math.inf)) == compare(a, b)
        assert compare(a, b).high > 1


def test_scores_must_be_finite():
    with pytest.raises(UserError, match=r"`values` must be finite, got \[1.0, nan\]"):
        summarize([1.0, math.nan])
    with pytest.raises(UserError, match=r"`b` must be finite scores, got \[inf, 1.0\]"):
        compare({0: 1.0, 1: 2.0}, {0: math.inf, 1: 1.0})


def test_summary_needs_a_value():
    with pytest.raises(UserError, match=r"`values` must contain .* at least one finished run, got none"):
        summarize([])


def test_same_seeds_in_any_order_are_paired():
    # The differences are 1, 2, 3, so t = 2 / (1 / sqrt(3)). With two degrees of freedom, p = 1 - t / sqrt(t² + 2).
    comparison = compare({0: 10.0, 1: 20.0, 2: 30.0}, {2: 33.0, 0: 11.0, 1: 22.0})
    t, half = 2 * math.sqrt(3), 4.302653 / math.sqrt(3)
    assert comparison.paired and not comparison.resolved
    assert comparison[1:5] == pytest.approx((2.0, 2 - half, 2 + half, 1 - t / math.sqrt(t**2 + 2)), rel=1e-6)
    assert (comparison.n_a, comparison.n_b) == (3, 3)


def test_difference_is_b_minus_a():
    a, b = scores_of([1.0, 2.0, 4.0]), scores_of([2.0, 5.0, 4.0])
    ab, ba = compare(a, b), compare(b, a)
    assert ab.difference == pytest.approx(4 / 3)
    assert (ba.difference, ba.low, ba.high) == pytest.approx((-ab.difference, -ab.high, -ab.low))
    assert (ba.p_value, ba.more) == (pytest.approx(ab.p_value), ab.more)


@pytest.mark.parametrize("first_seed", [1, 100])  # Seeds that overlap are not the same seeds.
def test_different_seeds_use_welchs_test(first_seed):
    # Variances 1 and 4, n = 3: standard error sqrt(5/3), degrees of freedom (5/3)² / ((1/9 + 16/9) / 2) = 50/17.
    comparison = compare(scores_of([1, 2, 3]), scores_of([4, 6, 8], first_seed))
    error, freedom = math.sqrt(5 / 3), 50 / 17
    half = scipy_stats.t.ppf(0.975, freedom) * error
    assert not comparison.paired
    assert comparison[1:5] == pytest.approx((4.0, 4 - half, 4 + half, 2 * scipy_stats.t.sf(4 / error, freedom)))


def test_number_of_seeds_may_differ():
    comparison = compare(scores_of([1, 2, 3, 4]), scores_of([2, 3]))
    assert (comparison.paired, comparison.n_a, comparison.n_b) == (False, 4, 2)
    assert comparison.difference == pytest.approx(0.0)


def test_clear_difference_is_resolved():
    comparison = compare(scores_of([0.90, 0.91, 0.92]), scores_of([0.95, 0.961, 0.969]))
    assert comparison.resolved and comparison.p_value < 0.05
    assert comparison.low > 0 and comparison.more == (0, 0)


def test_more_seeds_for_pairs_from_the_textbook():
    # An effect of half a deviation needs 34 pairs for a power of 80% at the two-sided 5% level; Cohen 1988, chapter 2.
    comparison = compare(scores_of(np.zeros(10)), scores_of(with_moments(10, mean=0.5, deviation=1.0)))
    assert comparison.paired and not comparison.resolved
    assert comparison.more == (34 - 10, 34 - 10)


@pytest.mark.parametrize("n_b", [5, 10])  # Both must reach 64.
def test_more_seeds_for_welchs_test_from_the_textbook(n_b):
    # An effect of half a deviation needs 64 of each; Cohen 1988, table 2.4.1.
    a, b = scores_of(with_moments(10, 0.0, 1.0)), scores_of(with_moments(n_b, 0.5, 1.0), first_seed=100)
    comparison = compare(a, b)
    assert not comparison.paired and not comparison.resolved
    assert comparison.more == (64 - 10, 64 - n_b)


def test_more_seeds_without_noise_in_one_experiment():
    # The degrees of freedom are those of the other experiment alone, so it needs as many seeds as pairs would.
    a, b = scores_of(np.zeros(10)), scores_of(with_moments(10, 0.5, 1.0), first_seed=100)
    assert compare(a, b).more == (34 - 10, 34 - 10)


def test_more_seeds_of_the_smaller_experiment_only():
    # The variance of 1,000 seeds is 0.001, so a needs almost as many as it would against a known mean: 34, as pairs do.
    a, b = scores_of(with_moments(2, 0.0, 1.0)), scores_of(with_moments(1000, 0.5, 1.0), first_seed=100)
    comparison = compare(a, b)
    assert not comparison.resolved and comparison.more is not None
    m = 2 + comparison.more[0]
    assert comparison.more[1] == 0 and 34 <= m <= 36
    rng = np.random.default_rng(0)
    for n, at_least in ((m - 2, False), (m + 2, True)):
        draws = rng.normal(0.5, 1, (20_000, 1000)), rng.normal(0, 1, (20_000, n))
        power = np.mean(scipy_stats.ttest_ind(*draws, axis=1, equal_var=False).pvalue < 0.05)
        assert (power > 0.8) == at_least


def test_more_seeds_reach_the_power_in_simulation():
    # For unequal variances there is no table: this n must detect the difference in 80% of 20,000 draws.
    a, b = with_moments(6, 0.0, 1.0), with_moments(6, 1.0, 2.0)
    more = compare(scores_of(a), scores_of(b, first_seed=100)).more
    assert more is not None and more[0] == more[1]
    rng, shape = np.random.default_rng(0), (20_000, 6 + more[0])
    test = scipy_stats.ttest_ind(rng.normal(1, 2, shape), rng.normal(0, 1, shape), axis=1, equal_var=False)
    assert np.mean(test.pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


def test_more_seeds_is_the_smallest_number_that_reaches_the_power():
    # An effect of two deviations is not resolved by three pairs, p is 0.074.
    pairs = compare(scores_of(np.zeros(3)), scores_of([1.0, 2.0, 3.0])).more
    assert pairs is not None and pairs[0] == pairs[1]
    more = pairs[0]
    rng = np.random.default_rng(0)
    power = [
        np.mean(scipy_stats.ttest_1samp(rng.normal(2, 1, (20_000, n)), 0, axis=1).pvalue < 0.05)
        for n in (3 + more - 1, 3 + more)
    ]
    assert power[0] < 0.8 < power[1]


def test_more_seeds_for_a_huge_effect():
    # SciPy returns NaN for the power of large n.
    comparison = compare(scores_of(np.zeros(2)), scores_of([1.0, 1.3]))
    assert not comparison.resolved and comparison.more == (1, 1)


@pytest.mark.parametrize("first_seed", [0, 100])
def test_more_seeds_is_none_above_the_limit(first_seed):
    a, b = with_moments(8, 0.0, 1.0), with_moments(8, 1e-3, 1.0)[::-1]
    assert compare(scores_of(a), scores_of(b, first_seed)).more is None


@pytest.mark.parametrize("first_seed", [0, 100])
def test_more_seeds_is_none_without_a_difference(first_seed):
    comparison = compare(scores_of([1.0, 2.0, 3.0]), scores_of([3.0, 2.0, 1.0], first_seed))
    assert (comparison.difference, comparison.resolved, comparison.more) == (0.0, False, None)


@pytest.mark.parametrize("first_seed", [0, 100])
def test_equal_scores_without_noise(first_seed):
    scores = scores_of([0.5, 0.5, 0.5]), scores_of([0.5, 0.5, 0.5], first_seed)
    unknown = (math.nan,) * 3
    assert compare(*scores)[:9] == pytest.approx((first_seed == 0, 0.0, *unknown, False, 3, 3, None), nan_ok=True)
    assert verdict(*scores) == ["b minus a: +0.00 points.", "The means are equal."]


@pytest.mark.parametrize(
    ("a", "b", "first_seed"),
    [
        ([0.5, 0.5], [0.75, 0.75], 100),
        ([0.25, 0.5], [0.375, 0.625], 0),
        ([0.91, 0.92, 0.93], [0.92, 0.93, 0.94], 0),  # These differences are equal except for rounding.
    ],
)
def test_differences_without_noise_are_not_resolved(a, b, first_seed):
    scores, n, difference = (scores_of(a), scores_of(b, first_seed)), len(a), b[0] - a[0]
    nothing = (math.nan,) * 3
    expected = (first_seed == 0, difference, *nothing, False, n, n, None)
    assert compare(*scores)[:9] == pytest.approx(expected, nan_ok=True)
    same = "All seeds of an experiment score the same" if first_seed else "All pairs of the same seed differ by this"
    assert verdict(*scores) == [
        f"b minus a: +{100 * difference:.2f} points.",
        f"The difference is not resolved. {same}, so the test set is too small, or there are too few seeds, to "
        "estimate the noise.",
    ]


def test_noise_in_one_experiment_only():
    comparison = compare(scores_of([0.5, 0.5, 0.5]), scores_of([0.4, 0.5, 0.7], first_seed=100))
    assert not comparison.resolved
    assert comparison.p_value == pytest.approx(scipy_stats.ttest_1samp([0.4, 0.5, 0.7], 0.5).pvalue)


@pytest.mark.parametrize("few", [{}, {0: 0.9}])
def test_comparison_needs_two_seeds(few):
    two = {0: 0.9, 1: 0.8}
    with pytest.raises(UserError, match=rf"`a` must have at least two finished seeds, got {len(few)}.*--seeds"):
        compare(few, two)
    with pytest.raises(UserError, match=rf"`b` must have at least two finished seeds, got {len(few)}.*--seeds"):
        compare(two, few)
    with pytest.raises(UserError, match=rf"`bad` must have at least two finished seeds, got {len(few)}"):
        verdicts({"good": two, "bad": few})


def test_p_is_corrected_for_several_comparisons_by_holms_method():
    scores = {
        "a": scores_of([0.50, 0.51, 0.52, 0.53]),
        "b": scores_of([0.51, 0.53, 0.52, 0.55]),
        "c": scores_of([0.60, 0.62, 0.615, 0.64]),
    }
    found = compare_all(scores, (0.0, 1.0))
    p = {pair: compare(scores[pair[0]], scores[pair[1]]).p_value for pair in found}
    assert p["b", "c"] < p["a", "c"] < 0.01 and p["a", "b"] > 0.05
    assert found["b", "c"].corrected == 3 * p["b", "c"] and found["a", "c"].corrected == 2 * p["a", "c"]
    assert found["a", "b"].corrected == p["a", "b"]
    assert [c.resolved for c in found.values()] == [False, True, True]
    lines = verdicts(scores)["a", "c"]
    assert lines[0].endswith(f", {2 * p['a', 'c']:.2g} corrected for 3 comparisons.")
    assert lines[1] == "The difference is resolved: c is better."


def test_a_comparison_without_noise_counts_as_one():
    flat = {0: 0.5, 1: 0.5, 2: 0.5}
    scores = {"a": flat, "b": {seed: x + 0.1 for seed, x in flat.items()}, "c": {0: 0.4, 1: 0.5, 2: 0.62}}
    found = compare_all(scores)
    assert math.isnan(found["a", "b"].p_value) and math.isnan(found["a", "b"].corrected)
    assert {c.comparisons for pair, c in found.items() if pair != ("a", "b")} == {3}
    small, large = sorted((found["a", "c"], found["b", "c"]), key=lambda c: c.p_value)
    assert small.corrected == 3 * small.p_value < 1 and large.corrected == max(
        small.corrected, min(1, 2 * large.p_value)
    )
    assert verdicts(scores)["a", "b"][1].startswith("The difference is not resolved. All pairs of the same seed differ")


def test_a_smaller_p_is_never_corrected_to_more_than_a_larger_one():
    scores = {"a": {0: 0.50, 1: 0.51, 2: 0.55}, "b": {0: 0.58, 1: 0.58, 2: 0.61}, "c": {0: 0.53, 1: 0.53, 2: 0.53}}
    found = compare_all(scores)
    assert 3 * found["a", "b"].p_value == found["a", "b"].corrected < 0.05
    alone, among = compare(scores["b"], scores["c"]), found["b", "c"]
    assert alone.p_value == among.p_value < 0.05 < among.corrected
    assert alone.resolved and not among.resolved and among.more is None
    rule = "The difference is not resolved. Train more seeds, or compare fewer experiments."
    assert verdicts(scores)["b", "c"][1] == rule
    assert found["a", "c"].corrected == max(among.corrected, found["a", "c"].p_value)
