"""
What one pass of a detector over a data set leaves for the figures.

Shape shorthand in this module:

    P: number of positives of an image
    K: number of foreground classes
    M: number of (proposal, class) pairs of an image that may become detections
"""

from dataclasses import dataclass, field

import numpy as np
from dataset_detections import Detections
from loading import OVERLAP
from running_sums import Correlation, Density, Means, cells_of
from spool import Spool
from torch import Tensor

from pisa_d2.samplers import Candidates

IOU_EDGES = np.linspace(0, 1, 41)
LOSS_EDGES = np.geomspace(1e-3, 10, 41)
FINE_IOU_EDGES = np.linspace(0, 1, 101)


@dataclass
class SampleStatistics:
    """
    What a strategy trains on: loss against IoU of positives (of the regressed box) and negatives
    (of the proposal), and the IoU of negatives alone.
    """

    positives: Density = field(default_factory=lambda: Density(IOU_EDGES, LOSS_EDGES))
    negatives: Density = field(default_factory=lambda: Density(IOU_EDGES, LOSS_EDGES))
    negative_ious: np.ndarray = field(
        default_factory=lambda: np.zeros(len(FINE_IOU_EDGES) - 1, dtype=np.int64)
    )
    num_overlapping: int = 0

    def add(self, positives: Candidates, negatives: Candidates) -> None:
        self.positives.add(
            as_numpy(positives.predictions.ious), as_numpy(positives.predictions.cls_losses)
        )
        ious = as_numpy(negatives.ious)
        self.negatives.add(ious, as_numpy(negatives.predictions.cls_losses))
        np.add.at(self.negative_ious, cells_of(ious, FINE_IOU_EDGES), 1)
        self.num_overlapping += int((ious > OVERLAP).sum())

    @property
    def num_negatives(self) -> int:
        return int(self.negative_ious.sum())


@dataclass
class ScoreStatistics:
    """
    Scores of test-time proposals: of positives the probability of their class, by IoU-HLR and by
    the IoU of the regressed box; of negatives the highest foreground one, by Score-HLR. Ranks are
    those of a batch of one image.
    """

    positives: Means = field(default_factory=Means)
    negatives: Means = field(default_factory=Means)
    by_iou: Means = field(default_factory=Means)
    correlation: Correlation = field(default_factory=Correlation)
    num_images: int = 0


@dataclass
class Ranks:
    """The positives of one image, P of them, with their boxes as regressed, and the image."""

    inputs: dict
    boxes: np.ndarray
    classes: np.ndarray
    objects: np.ndarray
    ious: np.ndarray
    local_ranks: np.ndarray
    hlr: np.ndarray


@dataclass
class ScoredBoxes:
    """
    What becomes the detections of an image.

    Attributes:
        boxes: (M, 4), clipped, XYXY in pixels of the input.
        classes, scores: (M,).
        owners: (M,), the positive whose box it is, whatever the class, or -1.
        gt_classes, objects, ious: (P,), of the positives.
        losses: (P,), their classification losses.
        own_logits: (P,), of their classes.
        rest_logits: (P,), the log of the sum of exponentials of all others: with the own logit it
            gives the softmax. None for sigmoids, in which classes do not depend on one another.
    """

    image_id: int | str
    input_size: tuple[int, int]
    image_size: tuple[int, int]
    boxes: Tensor
    classes: Tensor
    scores: Tensor
    owners: Tensor
    gt_classes: Tensor
    objects: Tensor
    ious: Tensor
    losses: Tensor
    own_logits: Tensor
    rest_logits: Tensor | None


@dataclass
class Findings:
    samples: dict[str, SampleStatistics]
    scores: ScoreStatistics
    detections: Detections
    scored_boxes: Spool[ScoredBoxes]
    ranks: Ranks | None = None


def as_numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
