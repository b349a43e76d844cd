"""The rows of a study: one for each run that is done, in a CSV file."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pisa_d2.engine.metrics import COCO_METRICS

from .bootstrap import Array
from .evaluation import Scores


class Row(NamedTuple):
    """A run: COCO AP in percent, seconds of training, and a digest of all that made it."""

    strategy: str
    seed: int
    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    seconds: float
    settings: str

    @classmethod
    def of(cls, strategy: str, seed: int, scores: Scores, seconds: float, settings: str) -> "Row":
        metrics = {name: round(scores.metrics[name], 3) for name in COCO_METRICS}
        return cls(strategy, seed, seconds=round(seconds, 1), settings=settings, **metrics)


class Results:
    """
    The rows of a file, and in a second file the AP of each run on the resampled test images.

    Args:
        path: of the CSV file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, int], Row] = {}
        self.resampled: dict[tuple[str, int], Array] = {}
        if path.is_file():
            for values in csv.DictReader(path.open()):
                row = Row(**{n: kind(values[n]) for n, kind in Row.__annotations__.items()})
                self.rows[row.strategy, row.seed] = row
        if self._arrays.is_file():
            with np.load(self._arrays) as file:
                for key, values in zip(file["keys"], file["values"], strict=True):
                    seed, strategy = str(key).split(" ", 1)
                    self.resampled[strategy, int(seed)] = values

    @property
    def _arrays(self) -> Path:
        return self.path.with_suffix(".resampled.npz")

    def done(self, strategy: str, seed: int, settings: str) -> bool:
        """
        Tell whether the run is there.

        Raises:
            ValueError: it is, but other settings, weights or data made it.
        """
        row = self.rows.get((strategy, seed))
        if row is not None and row.settings != settings:
            raise ValueError(
                f"'{self.path}' has a row of {strategy!r}, seed {seed}, that was made with other "
                "settings, weights or data. Name another --output, or remove the row to run it "
                "again."
            )
        return row is not None and (strategy, seed) in self.resampled

    def add(self, row: Row, resampled: Array) -> None:
        self.rows[row.strategy, row.seed] = row
        self.resampled[row.strategy, row.seed] = resampled.astype(np.float32)

    def write(self, order: Iterable[str]) -> None:
        """
        Args:
            order: of the strategies in the file; others come last.
        """
        place = {strategy: i for i, strategy in enumerate(order)}
        keys = sorted(self.rows, key=lambda key: (place.get(key[0], len(place)), *key))
        scratch = self.path.with_suffix(".tmp")
        # Before the rows: a run without a row is run again.
        with scratch.open("wb") as arrays:
            np.savez_compressed(
                arrays,
                keys=np.array([f"{seed} {strategy}" for strategy, seed in keys]),
                values=np.stack([self.resampled[key] for key in keys]),
            )
        os.replace(scratch, self._arrays)
        with scratch.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows(self.rows[key] for key in keys)
        os.replace(scratch, self.path)
