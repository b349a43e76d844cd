"""Sums over a dataset, whose size does not grow with the number of images."""

import numpy as np


class Density:
    """Counts of points in the cells of a grid; points outside it count in the cells at its rim."""

    def __init__(self, x_edges: np.ndarray, y_edges: np.ndarray) -> None:
        self.x_edges, self.y_edges = x_edges, y_edges
        self.counts = np.zeros((len(x_edges) - 1, len(y_edges) - 1), dtype=np.int64)
        self.sums = np.zeros(2)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        self.sums += x.sum(dtype=np.float64), y.sum(dtype=np.float64)
        cells = cells_of(x, self.x_edges), cells_of(y, self.y_edges)
        np.add.at(self.counts, cells, 1)

    @property
    def x_mean(self) -> float:
        """NaN without any point."""
        return float(self.sums[0]) / n if (n := int(self.counts.sum())) else float("nan")

    @property
    def y_mean(self) -> float:
        """NaN without any point."""
        return float(self.sums[1]) / n if (n := int(self.counts.sum())) else float("nan")


class Histogram:
    """Counts of values between edges, and their mean; values outside count in the end cells."""

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) - 1, dtype=np.int64)
        self.sum = 0.0

    def add(self, values: np.ndarray) -> None:
        np.add.at(self.counts, cells_of(values, self.edges), 1)
        self.sum += float(values.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        """NaN without any value."""
        number = int(self.counts.sum())
        return self.sum / number if number else float("nan")


class Means:
    """Number and sum of values by an integer key of at least 0."""

    def __init__(self) -> None:
        self.counts = np.zeros(0, dtype=np.int64)
        self.sums = np.zeros(0)

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        size = max(len(self.counts), keys.max(initial=-1) + 1)
        self.counts.resize(size, refcheck=False)
        self.sums.resize(size, refcheck=False)
        np.add.at(self.counts, keys, 1)
        np.add.at(self.sums, keys, values)

    @property
    def means(self) -> np.ndarray:
        """NaN where there is no value."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.counts


class Correlation:
    """Pearson's, of pairs."""

    def __init__(self) -> None:
        self.moments = np.zeros((3, 3))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        rows = np.stack([np.ones(len(x)), x, y]).astype(np.float64)
        self.moments += rows @ rows.T

    @property
    def value(self) -> float:
        """NaN for fewer than two pairs, or where one of the two never varies."""
        n, sums, products = self.moments[0, 0], self.moments[0, 1:], self.moments[1:, 1:]
        if n < 2:
            return float("nan")
        covariance = products / n - np.outer(sums, sums) / n**2
        scale = np.sqrt(max(covariance[0, 0], 0) * max(covariance[1, 1], 0))
        return float(covariance[0, 1] / scale) if scale > 0 else float("nan")


def cells_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Indices of the cells between ascending edges; a value on an edge is in the upper one."""
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
