"""Means over the seeds of a run, and their intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as students_t

LEVEL = 0.95


class OverSeeds(NamedTuple):
    """
    Mean over seeds and half the width of its 95% interval by Student's t, of each value; the latter
    is NaN for a single seed.
    """

    mean: np.ndarray
    half: np.ndarray

    @classmethod
    def of(cls, values: Sequence[np.ndarray | float]) -> "OverSeeds":
        """
        Args:
            values: of each seed, all of one shape.
        """
        stacked = np.stack([np.asarray(v, dtype=np.float64) for v in values])
        num, mean = len(stacked), stacked.mean(axis=0)
        if num < 2:
            return cls(mean, np.full_like(mean, np.nan))
        error = stacked.std(axis=0, ddof=1) / np.sqrt(num)
        return cls(mean, error * students_t.ppf((1 + LEVEL) / 2, num - 1))

    def facts(self, name: str) -> dict[str, float]:
        """A single value with its interval, for the numbers of a caption."""
        mean, half = float(self.mean), float(self.half)
        return {name: mean, f"{name}, low": mean - half, f"{name}, high": mean + half}

    def text(self, digits: int = 2) -> str:
        mean, half = float(self.mean), float(self.half)
        if np.isnan(half):
            return f"{mean:+.{digits}f}"
        return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


def over_seeds(
    values: Sequence[np.ndarray | float], baseline: Sequence[np.ndarray | float]
) -> OverSeeds:
    """Return the paired differences to the baseline, seed by seed."""
    return OverSeeds.of([a - b for a, b in zip(values, baseline, strict=True)])
