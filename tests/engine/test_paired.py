"""The statistics of runs, by other routes."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from pisa_d2.engine.paired import (
    Interval,
    holm,
    mean_interval,
    p_text,
    paired_t_test,
    pooled_spread,
    sign_test,
    welch,
)


def some_runs(num, seed=0):
    generator = np.random.default_rng(seed)
    of_seed = generator.normal(50, 2, num)
    return of_seed + generator.normal(1, 1, num), of_seed + generator.normal(0, 1, num)


@pytest.mark.parametrize("num", [2, 5, 20])
def test_the_paired_interval_and_p_value_are_those_of_scipys_paired_t_test(num):
    runs, baseline = some_runs(num)
    differences = (runs - baseline).tolist()
    expected = stats.ttest_rel(runs, baseline)
    low, high = expected.confidence_interval(0.95)
    interval = mean_interval(differences)
    assert interval == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert paired_t_test(differences) == pytest.approx(expected.pvalue)


def test_a_single_pair_has_no_interval_and_shows_nothing():
    assert mean_interval([1.5]) == Interval(1.5, float("inf"))
    assert mean_interval([1.5]).text(signed=True) == "+1.50"
    assert paired_t_test([1.5]) == 1.0


def test_what_has_no_ap_has_no_difference():
    for interval in (mean_interval([1.0, np.nan]), welch([1.0, np.nan], [2.0, 3.0]).interval()):
        assert np.isnan(interval.mean) and interval.text() == "none"


def test_intervals_and_p_values_are_printed_to_some_digits():
    assert Interval(1.234, 0.567).text(signed=True, digits=1) == "+1.2 ± 0.6"
    assert Interval(-1.234, 0.567).text() == "-1.23 ± 0.57"
    texts = [p_text(p) for p in (0.00001, 0.00123, 0.0456, 1.0)]
    assert texts == ["< 0.0001", "0.0012", "0.046", "1"]


def test_equal_differences_show_what_they_are():
    assert paired_t_test([0.0, 0.0, 0.0]) == 1.0
    assert paired_t_test([0.5, 0.5, 0.5]) == 0.0


@pytest.mark.parametrize("signs", ["+", "+-", "+++++", "+++++-", "++++00--", "-" * 9 + "+", "00"])
def test_the_sign_test_is_scipys_binomial_test_without_ties(signs):
    differences = [{"+": 0.3, "-": -0.2, "0": 0.0}[sign] for sign in signs]
    up, num = signs.count("+"), len(signs.replace("0", ""))
    expected = stats.binomtest(up, num).pvalue if num else 1.0
    assert sign_test(differences) == pytest.approx(expected)


def test_holm_is_the_closed_test_of_all_bonferroni_tests():
    """A comparison is rejected if every intersection of hypotheses with it in is rejected."""
    generator = np.random.default_rng(0)
    for num in (1, 2, 3, 6):
        values = (generator.random(num) ** 3).tolist()
        subsets = [s for size in range(1, num + 1) for s in combinations(range(num), size)]
        expected = [
            max(min(1, len(s) * min(values[j] for j in s)) for s in subsets if i in s)
            for i in range(num)
        ]
        assert holm(values) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(5, 3), (2, 8), (20, 20)])
def test_unpaired_rows_are_compared_as_by_scipys_welch_test(sizes):
    runs, baseline = some_runs(sizes[0])[0], 2 * some_runs(sizes[1], seed=1)[1]
    expected = stats.ttest_ind(runs, baseline, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    compared = welch(runs.tolist(), baseline.tolist())
    assert compared.interval() == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert compared.p_value() == pytest.approx(expected.pvalue)


def test_unpaired_runs_that_do_not_vary_show_what_they_are():
    assert welch([1.0, 1.0], [2.0, 2.0]).p_value() == 0.0
    assert welch([1.0, 1.0], [1.0, 1.0]).p_value() == 1.0
    single = welch([1.0], [3.0, 2.0])
    assert (single.interval(), single.p_value()) == ((-1.5, float("inf")), 1.0)


def test_the_pooled_spread_is_the_residual_of_a_least_squares_fit():
    table = np.random.default_rng(3).normal(40, 3, (4, 6))
    rows, columns = np.indices(table.shape).reshape(2, -1)
    design = np.concatenate([np.eye(4)[rows], np.eye(6)[columns]], axis=1)
    _, residuals, rank, _ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    left = table.ravel() - design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
    freedom = table.size - rank
    runs = {f"s{i}": dict(enumerate(row)) for i, row in enumerate(table.tolist())}
    runs["s0"][17] = 99.0  # a seed that the others do not have
    spread = pooled_spread(runs)
    assert spread.freedom == freedom
    assert spread.deviation == pytest.approx(np.sqrt(left @ left / freedom))


def test_of_two_strategies_the_pooled_spread_is_their_own():
    runs, baseline = some_runs(7)
    table = {"a": dict(enumerate(runs.tolist())), "b": dict(enumerate(baseline.tolist()))}
    differences = (runs - baseline).tolist()
    assert pooled_spread(table).of_difference(differences) == pytest.approx(
        mean_interval(differences)
    )
