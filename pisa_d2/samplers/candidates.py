"""Candidates for samplers, and the choices among them."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Predictions:
    """
    The box head's predictions for the candidates under the current weights, without gradient. Only
    the predictions that a sampler needs exist; reading any other is an AttributeError.

    Attributes:
        cls_losses: floating (N,), classification losses.
        box_losses: floating (N,), box losses times their weight; 0 for negatives.
        scores: floating (N,), highest foreground probability.
        boxes: floating (N, 4), XYXY in pixels, regressed for the class of the matched object
            (positives) or for the highest-scored class (negatives).
        ious: floating (N,), IoU of these boxes with the matched object.
    """

    FIELDS = ("cls_losses", "box_losses", "scores", "boxes", "ious")

    cls_losses: Tensor
    box_losses: Tensor
    scores: Tensor
    boxes: Tensor
    ious: Tensor

    def __init__(
        self,
        cls_losses: Tensor | None = None,
        box_losses: Tensor | None = None,
        scores: Tensor | None = None,
        boxes: Tensor | None = None,
        ious: Tensor | None = None,
    ) -> None:
        values = zip(self.FIELDS, (cls_losses, box_losses, scores, boxes, ious), strict=True)
        self.__dict__.update({name: value for name, value in values if value is not None})

    def __getattr__(self, name: str) -> Tensor:
        if name in self.FIELDS:
            raise AttributeError(
                f"The predictions have no {name}: add it to the sampler's needs_predictions."
            )
        raise AttributeError(name)


def needed_predictions(needs: bool | Collection[str]) -> tuple[str, ...]:
    """
    Return the names of the predictions in a sampler's ``needs_predictions``.

    Raises:
        ValueError: a name is not in ``Predictions.FIELDS``.
    """
    names = Predictions.FIELDS if needs is True else needs or ()
    if isinstance(names, str) or not set(names) <= set(Predictions.FIELDS):
        raise ValueError(
            f"needs_predictions = {needs!r} is not allowed: it must be True for all, False for "
            f"none, or a tuple of some of {Predictions.FIELDS}."
        )
    return tuple(name for name in Predictions.FIELDS if name in names)


class Candidates:
    """
    The proposals of one image, matched to its objects. A :class:`ProposalSampler` gets only the
    positives or only the negatives of them.

    Attributes:
        boxes: floating (N, 4), XYXY in pixels.
        ious: floating (N,), IoU with the matched object; 0 in an image without objects.
        objects: int64 (N,), index of the matched object in the image; 0 in an image without
            objects.
        classes: int64 (N,), its class; the number of classes for negatives, -1 for ignored ones.
        predictions: the :class:`Predictions` that samplers need, None if they need none.
        negative_range: the lowest and the highest IoU of negatives, see
            :class:`pisa_d2.matcher.Match`.
    """

    boxes: Tensor
    ious: Tensor
    objects: Tensor
    classes: Tensor
    predictions: Any  # Predictions if a sampler needs them
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
        Select some of the candidates.

        Args:
            rows: int64, their indices.
        """
        return _Selected(self, rows)

    def with_predictions(self, predictions: Predictions) -> "Candidates":
        """Return the same candidates with predictions."""
        return Candidates(
            self.boxes, self.ious, self.objects, self.classes, predictions, self.negative_range
        )


class _Lazy:
    """Make each attribute on its first use, since most samplers read one or two."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling look before __init__ has run
            raise AttributeError(name)
        values = self._make(name)
        setattr(self, name, values)
        return values


class _Selected(_Lazy, Candidates):
    def __init__(self, whole: Candidates, rows: Tensor) -> None:
        def select(name: str) -> Any:
            value = getattr(whole, name)
            return value if name == "negative_range" else value[rows]

        _Lazy.__init__(self, select)
        self._rows = rows
        of_whole = whole.predictions
        self.predictions = None
        if of_whole is not None:
            self.predictions = _Lazy(lambda name: getattr(of_whole, name)[rows])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        return self._rows.device


class Joined(_Lazy, Candidates):
    """The candidates of several images, image after image; objects keep their number per image."""

    def __init__(self, batch: Sequence[Candidates]) -> None:
        """
        Args:
            batch: of at least one image.
        """

        def join(name: str) -> Tensor:
            if name == "negative_range":
                raise AttributeError(f"{name} differs between images: see Images.")
            return torch.cat([getattr(candidates, name) for candidates in batch])

        _Lazy.__init__(self, join)
        self._batch = batch
        self.predictions = None
        if batch[0].predictions is not None:
            self.predictions = _Lazy(
                lambda name: torch.cat([getattr(c.predictions, name) for c in batch])
            )

    def __len__(self) -> int:
        return sum(len(candidates) for candidates in self._batch)

    @property
    def device(self) -> torch.device:
        return self._batch[0].device


class Quota(NamedTuple):
    """
    The number of samples to choose.

    Attributes:
        num_per_image: the largest number of samples per image.
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
            negatives if their sampler ranked them; None to let ISR-N rank them.
    """

    positives: Tensor
    negatives: Tensor
    negative_importance: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """Return the indices of both kinds, the positives first."""
        return torch.cat([self.positives, self.negatives])


def is_positive(classes: Tensor, num_classes: int) -> Tensor:
    """Return which candidates are neither ignored (-1) nor background (``num_classes``)."""
    return (classes >= 0) & (classes < num_classes)
