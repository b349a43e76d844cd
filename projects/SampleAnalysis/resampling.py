"""
The spread of AP over images.

Shape shorthand in this module:

    I: number of images
    T: number of IoU thresholds
    K: number of classes
    A: number of ranges of object size
"""

import numpy as np
from coco_scores import Evaluation
from tqdm import tqdm


class Resampler:
    """AP of an evaluated dataset in which each image counts any number of times."""

    def __init__(self, evaluation: Evaluation) -> None:
        """
        Args:
            evaluation: with details.
        """
        self.recalls = evaluation.recalls
        self.shape = evaluation.precision.shape
        self.num_images = len(evaluation.image_ids)
        self._marks = evaluation.marks

    def average_precision(self, counts: np.ndarray) -> np.ndarray:
        """
        Args:
            counts: integer (I,), how often each image counts.

        Returns:
            As :func:`coco_scores.average_precision`.
        """
        num_thresholds, _, num_classes, num_sizes = self.shape
        ap = np.full((num_classes * num_sizes, num_thresholds), np.nan)
        for row, marks in zip(ap, self._marks, strict=True):
            total = marks.num_objects @ counts[marks.images_of_objects]
            if total == 0:
                continue
            weights = counts[marks.images]
            right, wrong = (
                (np.unpackbits(bits, axis=0, count=num_thresholds) * weights).cumsum(axis=1)
                for bits in (marks.right, marks.wrong)
            )
            precision = right / np.maximum(right + wrong, 1)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for t in range(num_thresholds):
                at = np.searchsorted(right[t] / total, self.recalls)
                reached = at < len(weights)
                row[t] = 100 * best[t, at[reached]].sum() / len(self.recalls)
        return ap.reshape(num_classes, num_sizes, -1).transpose(2, 0, 1)


def bootstrap(evaluations: list[Evaluation], num_draws: int, seed: int) -> list[np.ndarray]:
    """
    AP (draws, T, K, A) of each evaluation, over images drawn with replacement. They are the same
    in all evaluations, so differences can be taken draw by draw.
    """
    resamplers = [Resampler(evaluation) for evaluation in evaluations]
    num_images = resamplers[0].num_images
    draws = np.random.default_rng(seed).multinomial(
        num_images, np.full(num_images, 1 / num_images), size=num_draws
    )
    of_draws = [
        [resampler.average_precision(counts) for resampler in resamplers]
        for counts in tqdm(draws, desc="bootstrap", delay=5)
    ]
    return [np.stack(of_one) for of_one in zip(*of_draws, strict=True)]
