"""
Statistics of runs that share their seeds, and of runs that do not; they need scipy.

Everything is an average precision in percent, or a difference of two. An interval is the mean and
half of its 95% confidence interval.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t as students_t

LEVEL = 0.95
# A p-value below this, after a correction, is called a difference.
SIGNIFICANT = 0.05


class Interval(NamedTuple):
    """A mean and half of its 95% interval, which is infinite where nothing says how wide it is."""

    mean: float
    half: float

    def text(self, signed: bool = False, digits: int = 2) -> str:
        """The interval to ``digits`` decimals; "none" where the mean is NaN."""
        if math.isnan(self.mean):
            return "none"
        half = f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else ""
        return f"{self.mean:{'+' if signed else ''}.{digits}f}{half}"


def p_text(p: float) -> str:
    """A p-value to two significant digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def mean_interval(values: Sequence[float]) -> Interval:
    """
    The mean of independent values by Student's t with their own spread: of the differences of
    paired runs, the paired t interval. It is NaN if a value is.
    """
    mean = statistics.mean(values)
    if len(values) < 2 or math.isnan(mean):
        return Interval(mean, math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, _quantile(len(values) - 1) * error)


def paired_t_test(differences: Sequence[float]) -> float:
    """
    Two-sided p-value for a mean difference of 0; 1 for a single pair and for differences that are
    all 0.
    """
    if len(differences) < 2 or not any(differences):
        return 1.0
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 0.0
    t = abs(statistics.mean(differences)) / error
    return float(2 * students_t.sf(t, len(differences) - 1))


def sign_test(differences: Sequence[float]) -> float:
    """
    Exact two-sided p-value for positive and negative differences being equally likely. Ties are
    left out.
    """
    num_up = sum(d > 0 for d in differences)
    num = num_up + sum(d < 0 for d in differences)
    tail = sum(math.comb(num, k) for k in range(max(num_up, num - num_up), num + 1))
    return min(1.0, 2 * tail / 2**num)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Adjusted p-values by Holm's step-down method, in the order of ``p_values``: with each below
    0.05 called a difference, the chance of any false one in the family is at most 0.05.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


class Welch(NamedTuple):
    """The difference of two means, its standard error and degrees of freedom by Welch."""

    mean: float
    error: float
    freedom: float

    def interval(self) -> Interval:
        if self.freedom == 0:
            return Interval(self.mean, math.inf)
        return Interval(self.mean, _quantile(self.freedom) * self.error)

    def p_value(self) -> float:
        """Two-sided, for a difference of 0; 1 where a mean is of one run."""
        if self.freedom == 0 or self.mean == 0:
            return 1.0
        if self.error == 0:
            return 0.0
        return float(2 * students_t.sf(abs(self.mean) / self.error, self.freedom))


def welch(values: Sequence[float], baseline: Sequence[float]) -> Welch:
    """
    Compare runs that are not paired, such as runs of two schedules, with the spread of each. The
    mean is NaN if a value is.
    """
    mean = statistics.mean(values) - statistics.mean(baseline)
    if min(len(values), len(baseline)) < 2 or math.isnan(mean):
        return Welch(mean, math.inf, 0.0)
    variances = [statistics.variance(v) / len(v) for v in (values, baseline)]
    total = sum(variances)
    if total == 0:
        return Welch(mean, 0.0, math.inf)
    parts = zip(variances, (values, baseline), strict=True)
    freedom = total**2 / sum(variance**2 / (len(v) - 1) for variance, v in parts)
    return Welch(mean, math.sqrt(total), freedom)


class PooledSpread(NamedTuple):
    """Standard deviation of a run, and its degrees of freedom."""

    deviation: float
    freedom: int

    def of_difference(self, differences: Sequence[float]) -> Interval:
        """The mean of paired differences, with the pooled spread instead of their own."""
        mean = statistics.mean(differences)
        if self.freedom == 0:
            return Interval(mean, math.inf)
        error = self.deviation * math.sqrt(2 / len(differences))
        return Interval(mean, _quantile(self.freedom) * error)


def pooled_spread(runs: Mapping[str, Mapping[int, float]]) -> PooledSpread:
    """
    The residuals from the mean of each strategy and of each seed, pooled over all strategies as in
    a two-way analysis of variance. This is right where all strategies vary equally.

    Args:
        runs: a value for each seed, by strategy. Only seeds that all strategies have are used.
    """
    shared = sorted(set.intersection(*(set(of_seed) for of_seed in runs.values())))
    freedom = (len(runs) - 1) * (len(shared) - 1)
    if freedom <= 0:
        return PooledSpread(0.0, 0)
    of_seed = {seed: statistics.mean(values[seed] for values in runs.values()) for seed in shared}
    grand = statistics.mean(of_seed.values())
    squares = 0.0
    for values in runs.values():
        mean = statistics.mean(values[seed] for seed in shared)
        squares += sum((values[s] - mean - of_seed[s] + grand) ** 2 for s in shared)
    return PooledSpread(math.sqrt(squares / freedom), freedom)


def _quantile(freedom: float) -> float:
    return float(students_t.ppf((1 + LEVEL) / 2, freedom))
