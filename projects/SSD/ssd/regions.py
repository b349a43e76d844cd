"""Makes torchvision's transforms move and clip regions to ignore with the image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F


class Regions(tv_tensors.TVTensor):
    """
    Floating (M, 4), boxes XYXY in pixels. Unlike torchvision's ``BoundingBoxes``, they guide no
    crop, and a crop keeps those whose centre it leaves out.

    Attributes:
        canvas_size: height and width of the image.
    """

    canvas_size: tuple[int, int]


def make_regions(boxes: Tensor, canvas_size: tuple[int, int]) -> Regions:
    regions = boxes.as_subclass(Regions)
    regions.canvas_size = canvas_size
    return regions


def _move_as_boxes(functional: Callable[..., Any]) -> None:
    @F.register_kernel(functional, Regions)
    def kernel(regions: Regions, *args: Any, **kwargs: Any) -> Regions:
        boxes = tv_tensors.BoundingBoxes(
            regions.as_subclass(torch.Tensor), format="XYXY", canvas_size=regions.canvas_size
        )
        moved = functional(boxes, *args, **kwargs)
        return make_regions(moved.as_subclass(torch.Tensor), moved.canvas_size)


for _functional in (F.crop, F.pad, F.resize, F.horizontal_flip, F.vertical_flip):
    _move_as_boxes(_functional)
