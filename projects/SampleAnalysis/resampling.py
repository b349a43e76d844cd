"""
The spread of AP over images.

Shape shorthand in this module:

    I: number of images
    T: number of IoU thresholds
    K: number of classes
    A: number of ranges of object size
"""

import warnings

import numpy as np
from coco_scores import Evaluation, average_precision
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


def draw_images(num_images: int, num_draws: int, seed: int) -> np.ndarray:
    """Return how often each image (draws, I) is drawn, as many as there are, with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_draws)


def share_interval(
    parts: np.ndarray, wholes: np.ndarray, seed: int, num_draws: int = 1000
) -> tuple[float, float, float]:
    """
    Return a share with the 95% bootstrap interval over images, all in percent; NaN without any.

    Args:
        parts, wholes: integer (I,), numerator and denominator of each image.
    """
    num = len(parts)
    if num == 0 or wholes.sum() == 0:
        return (float("nan"),) * 3
    counts = draw_images(num, num_draws, seed)
    sums = counts @ wholes
    shares = 100 * (counts @ parts)[sums > 0] / sums[sums > 0]
    low, high = np.percentile(shares, [2.5, 97.5])
    return 100 * parts.sum() / wholes.sum(), float(low), float(high)


def bootstrap(evaluations: list[Evaluation], num_draws: int, seed: int) -> list[np.ndarray]:
    """
    Return AP (draws, T, K, A) of each evaluation over images drawn with replacement. All
    evaluations share the draws, so differences can be taken draw by draw.
    """
    resamplers = [Resampler(evaluation) for evaluation in evaluations]
    num_images = resamplers[0].num_images
    draws = draw_images(num_images, num_draws, seed)
    of_draws = [
        [resampler.average_precision(counts) for resampler in resamplers]
        for counts in tqdm(draws, desc="bootstrap", delay=5)
    ]
    return [np.stack(of_one) for of_one in zip(*of_draws, strict=True)]


def mean_ap(ap: np.ndarray) -> np.ndarray:
    """Return the mean over IoU thresholds and classes of AP (*, T, K, A), of all object sizes."""
    with warnings.catch_warnings():  # a draw may hold no object of a class
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(ap[..., 0], axis=(-2, -1))


def ap_difference(
    first: Evaluation, second: Evaluation, num_draws: int, seed: int
) -> tuple[float, float, float]:
    """Return the second's AP minus the first's, with its 95% bootstrap interval."""
    drawn = [mean_ap(ap) for ap in bootstrap([first, second], num_draws, seed)]
    point = [float(mean_ap(average_precision(e))) for e in (first, second)]
    low, high = np.nanpercentile(drawn[1] - drawn[0], [2.5, 97.5])
    return point[1] - point[0], float(low), float(high)
