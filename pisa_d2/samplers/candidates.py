"""Candidates for samplers, and their choices."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Predictions(NamedTuple):
    """
    Predictions of the box head for the candidates under the current weights, without gradient.

    Attributes:
        cls_losses: floating (N,), classification losses.
        box_losses: floating (N,), box losses times their weight; 0 for negatives.
        scores: floating (N,), highest foreground probability.
        boxes: floating (N, 4), XYXY in pixels, regressed for the class of the matched object
            (positives) or for the highest-scored class (negatives).
        ious: floating (N,), IoU of these boxes with the matched object.
    """

    cls_losses: Tensor
    box_losses: Tensor
    scores: Tensor
    boxes: Tensor
    ious: Tensor


class Candidates:
    """
    The proposals of one image, matched to its objects; or the positives, or the negatives, among
    them, which is what a sampler gets.

    Attributes:
        boxes: floating (N, 4), XYXY in pixels.
        ious: floating (N,), IoU with the matched object; 0 where the image has none.
        objects: int64 (N,), index in the image of the matched object; 0 where the image has none.
        classes: int64 (N,), its class; the number of classes for negatives, -1 for ignored ones.
        predictions: made if a sampler ``needs_predictions``, otherwise None.
        negative_range: from which to which IoU negatives reach, see
            :class:`pisa_d2.matcher.Match`.
    """

    boxes: Tensor
    ious: Tensor
    objects: Tensor
    classes: Tensor
    predictions: Any  # Predictions where a sampler needs them
    negative_range: tuple[float, float]

    def __init__(
        self,
        boxes: Tensor,
        ious: Tensor,
        objects: Tensor,
        classes: Tensor,
        predictions: Predictions | None = None,
        negative_range: tuple[float, float] = (0.0, 0.5),
    ) -> None:
        self.boxes = boxes
        self.ious = ious
        self.objects = objects
        self.classes = classes
        self.predictions = predictions
        self.negative_range = negative_range

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def device(self) -> torch.device:
        return self.boxes.device

    def select(self, rows: Tensor) -> "Candidates":
        """
        Some of them.

        Args:
            rows: int64, their indices.
        """
        return _Selected(self, rows)

    def with_predictions(self, predictions: Predictions) -> "Candidates":
        return Candidates(
            self.boxes, self.ious, self.objects, self.classes, predictions, self.negative_range
        )


class _Rows:
    """Gathers rows of each attribute when it is first asked for: most samplers read one or two."""

    def __init__(self, whole: Any, rows: Tensor) -> None:
        self._whole, self._rows = whole, rows

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):  # copying and pickling ask before there is a whole
            raise AttributeError(name)
        values = getattr(self._whole, name)[self._rows]
        setattr(self, name, values)
        return values


class _Selected(_Rows, Candidates):
    def __init__(self, whole: Candidates, rows: Tensor) -> None:
        _Rows.__init__(self, whole, rows)
        self.negative_range = whole.negative_range
        predictions = whole.predictions
        self.predictions = None if predictions is None else _Rows(predictions, rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        return self._rows.device


class Quota(NamedTuple):
    """
    Attributes:
        num_per_image: number of samples per image, at most.
        positive_fraction: the largest share of positives among them, in [0, 1].
        num_classes: number of foreground classes K, which is the class of negatives.
    """

    num_per_image: int
    positive_fraction: float
    num_classes: int


class Choice(NamedTuple):
    """
    The samples of one image.

    Attributes:
        positives, negatives: int64, indices of the chosen candidates.
        negative_importance: float, see :func:`pisa_d2.reweighting.importance`, of the chosen
            negatives, where their sampler ranked them; None where ISR-N has to.
    """

    positives: Tensor
    negatives: Tensor
    negative_importance: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """Indices of both, the positives first."""
        return torch.cat([self.positives, self.negatives])


def is_positive(classes: Tensor, num_classes: int) -> Tensor:
    """Neither ignored (-1) nor background (``num_classes``)."""
    return (classes >= 0) & (classes < num_classes)
