"""
The results of one pass of a detector over a dataset, for the figures.

Shape shorthand in this module:

    P: number of positives of an image
    N: number of boxes
    M: number of (proposal, class) pairs of an image that may become detections
"""

from dataclasses import dataclass, field

import numpy as np
from dataset_detections import Detections
from loading import OVERLAP
from running_sums import Correlation, Density, Histogram, Means, cells_of
from sampling_picture import Samples
from spool import Spool
from torch import Tensor

from pisa_d2.samplers import Candidates

IOU_EDGES = np.linspace(0, 1, 41)
LOSS_EDGES = np.geomspace(1e-3, 10, 41)
FINE_IOU_EDGES = np.linspace(0, 1, 101)
KINDS = ("positives", "negatives")


@dataclass
class SampleStatistics:
    """
    The samples that a strategy trains on: loss against IoU of positives (of the regressed box) and
    negatives (of the proposal), and the IoU of negatives alone.

    Attributes:
        per_image: of each image the numbers of negatives, of negatives with an IoU above
            ``OVERLAP``, of objects, and of objects with a positive.
    """

    positives: Density = field(default_factory=lambda: Density(IOU_EDGES, LOSS_EDGES))
    negatives: Density = field(default_factory=lambda: Density(IOU_EDGES, LOSS_EDGES))
    negative_ious: np.ndarray = field(
        default_factory=lambda: np.zeros(len(FINE_IOU_EDGES) - 1, dtype=np.int64)
    )
    per_image: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, positives: Candidates, negatives: Candidates, num_objects: int) -> None:
        """Add the samples of an image with this number of objects."""
        self.positives.add(
            as_numpy(positives.predictions.ious), as_numpy(positives.predictions.cls_losses)
        )
        ious = as_numpy(negatives.ious)
        self.negatives.add(ious, as_numpy(negatives.predictions.cls_losses))
        np.add.at(self.negative_ious, cells_of(ious, FINE_IOU_EDGES), 1)
        num_covered = len(np.unique(as_numpy(positives.objects)))
        self.per_image.append((len(ious), int((ious > OVERLAP).sum()), num_objects, num_covered))

    @property
    def num_negatives(self) -> int:
        return int(self.negative_ious.sum())

    @property
    def num_overlapping(self) -> int:
        return sum(image[1] for image in self.per_image)


@dataclass
class ScoreStatistics:
    """
    Scores of test-time proposals: of positives the probability of their class, by IoU-HLR and by
    the IoU of the regressed box; of negatives the highest foreground one, by Score-HLR. Ranks are
    computed in a batch of one image. ``losses`` and ``ious`` are the classification losses and the
    IoUs of the regressed boxes of all positives and all negatives.
    """

    positives: Means = field(default_factory=Means)
    negatives: Means = field(default_factory=Means)
    by_iou: Means = field(default_factory=Means)
    correlation: Correlation = field(default_factory=Correlation)
    losses: dict[str, Histogram] = field(
        default_factory=lambda: {kind: Histogram(LOSS_EDGES) for kind in KINDS}
    )
    ious: dict[str, Histogram] = field(
        default_factory=lambda: {kind: Histogram(IOU_EDGES) for kind in KINDS}
    )
    num_images: int = 0


@dataclass
class RankedBoxes:
    """
    Boxes of one image and their two ranks: the positives, or the negatives that Score-HLR ranks.

    Attributes:
        boxes: (N, 4), as regressed, XYXY in pixels of the input.
        groups: (N,), the object of a positive, or the group by NMS of a negative.
        partitions: (N,), separately ranked: the class of a positive, 0 for a negative.
        ious, scores, losses: (N,); the score of a positive is that of its class.
        local_ranks, ranks: (N,), the rank in the group, and the hierarchical local rank.
    """

    boxes: np.ndarray
    groups: np.ndarray
    partitions: np.ndarray
    ious: np.ndarray
    scores: np.ndarray
    losses: np.ndarray
    local_ranks: np.ndarray
    ranks: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass
class Scene:
    """One image, its test-time proposals, and the samples of each strategy."""

    inputs: dict
    positives: RankedBoxes
    negatives: RankedBoxes
    hardest_negative: RankedBoxes


@dataclass
class SampledImage:
    """The samples that strategies chose in one image."""

    inputs: dict
    num_objects: int
    samples: dict[str, Samples]


@dataclass
class ScoredBoxes:
    """
    The boxes and scores that become the detections of an image.

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
    """
    Attributes:
        scene: the image whose ranks are drawn.
        sampled: the image whose samples are drawn.
        uneven: the image in which random positives miss the most objects that instance-balanced
            positives reach.
    """

    samples: dict[str, SampleStatistics]
    scores: ScoreStatistics
    detections: Detections
    scored_boxes: Spool[ScoredBoxes]
    scene: Scene | None = None
    sampled: SampledImage | None = None
    uneven: SampledImage | None = None


def as_numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
