"""
Pooled features of all boxes of a cached view, which steps look up instead of pooling them again.

They are the same in every step, since the feature maps are frozen.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import ROIHeads
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn


class Pooled(NamedTuple):
    """
    Attributes:
        settings: of the pooler, see :func:`settings_of`.
        boxes: float (N, 4), the proposals, and behind them the objects of a training image.
        features: floating (N, C, height, width), pooled from these boxes.
    """

    settings: str
    boxes: Tensor
    features: Tensor


def pooler_of(head: ROIHeads) -> tuple[str, ROIPooler] | None:
    """The attribute of the box branch's pooler and its value; None if it is not Detectron2's."""
    for name in ("box_pooler", "pooler"):  # StandardROIHeads, Res5ROIHeads
        pooler = getattr(head, name, None)
        if (
            isinstance(pooler, ROIPooler)
            and type(pooler).forward is ROIPooler.forward
            and all(type(layer) is ROIAlign for layer in pooler.level_poolers)
        ):
            return name, pooler
    return None


def settings_of(pooler: ROIPooler) -> str:
    """All that the features of a box depend on, but the feature maps."""
    names = ("output_size", "min_level", "max_level", "canonical_level", "canonical_box_size")
    return str([*(getattr(pooler, name) for name in names), *pooler.level_poolers])


@torch.no_grad()
def pool(pooler: ROIPooler, maps: list[Tensor], boxes: Tensor) -> Pooled:
    """
    Args:
        maps: feature maps (1, C, H, W) of an image.
        boxes: float (N, 4).
    """
    return Pooled(settings_of(pooler), boxes, pooler(maps, [Boxes(boxes)]))


def places(boxes: Tensor, known: Tensor) -> Tensor | slice | None:
    """The indices of ``boxes`` (N, 4) among ``known`` (M, 4); None if one of them is not there."""
    if torch.equal(boxes, known[: len(boxes)]):
        return slice(len(boxes))
    if len(known) == 0:
        return None
    found, rows = (boxes[:, None] == known).all(dim=2).max(dim=1)
    return rows if found.all() else None


class _LookUp(nn.Module):
    """Takes the place of a pooler for one batch."""

    def __init__(self, pooler: ROIPooler, batch: Sequence[Pooled]) -> None:
        super().__init__()
        self.output_size = pooler.output_size
        self._pooler, self._batch = pooler, batch

    def forward(self, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        rows = [
            places(own.tensor, pooled.boxes) for own, pooled in zip(boxes, self._batch, strict=True)
        ]
        if any(own is None for own in rows):  # by a head that makes other boxes
            return self._pooler(maps, boxes)
        features = [pooled.features[own] for own, pooled in zip(rows, self._batch, strict=True)]
        return torch.cat(features).to(maps[0].dtype)


@contextmanager
def looking_up(head: ROIHeads, batch: Sequence[Pooled | None]) -> Iterator[None]:
    """
    Let the box branch of ``head`` look up the features of the boxes of a batch, if all were pooled
    with the settings of its own pooler.
    """
    name, pooler = pooler_of(head) or ("", None)
    settings = pooler and settings_of(pooler)
    known = [pooled for pooled in batch if pooled is not None and pooled.settings == settings]
    if pooler is None or len(known) < len(batch):
        yield
        return
    setattr(head, name, _LookUp(pooler, known))
    try:
        yield
    finally:
        setattr(head, name, pooler)
