"""Box features that were pooled once without gradient and are trained on afterwards."""

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..hlr import at_least_float32


class _KnownROIAlign(torch.autograd.Function):
    """ROIAlign whose output is there already, so that its gradient alone is left to compute."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        rois: Tensor,
        rows_of_levels: list[Tensor],
        layers: list[ROIAlign],
        *features: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rois, *rows_of_levels)
        ctx.layers = layers
        ctx.shapes = [(feature.shape, feature.dtype) for feature in features]
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rois, *rows_of_levels = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for needed, rows, layer, (shape, dtype) in zip(
            ctx.needs_input_grad[4:], rows_of_levels, ctx.layers, ctx.shapes, strict=True
        ):
            if not needed:
                grads.append(None)
                continue
            rois_of_level = at_least_float32(rois[rows].to(dtype))  # rounded as in the forward
            level_grad = torch.ops.torchvision._roi_align_backward(
                grad[rows].to(rois_of_level.dtype).contiguous(),
                rois_of_level,
                layer.spatial_scale,
                *layer.output_size,
                *shape,
                layer.sampling_ratio,
                layer.aligned,
            )
            grads.append(level_grad.to(dtype))
        return None, None, None, None, *grads


class ReusingPooler(nn.Module):
    """
    A :class:`ROIPooler` that can be told what it would pool next. Its parameters, of which there
    are none, and its results are those of the pooler that it wraps.
    """

    def __init__(self, pooler: ROIPooler) -> None:
        super().__init__()
        self.pooler = pooler
        self._known: tuple[list[Boxes], Tensor] | None = None

    def remember(self, boxes: list[Boxes], pooled: Tensor) -> None:
        """
        Args:
            boxes: the boxes of each image that the next call will ask for: these very objects.
            pooled: their features, which this pooler made without gradient.
        """
        # Deterministic ROIAlign, as torch may be asked for, has no backward of its own to call.
        if (
            all(isinstance(layer, ROIAlign) for layer in self.pooler.level_poolers)
            and hasattr(torch.ops.torchvision, "_roi_align_backward")
            and not torch.are_deterministic_algorithms_enabled()
        ):
            self._known = boxes, pooled

    def forget(self) -> None:
        self._known = None

    def forward(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        known, self._known = self._known, None
        if (
            known is None
            or len(known[0]) != len(boxes)
            or any(a is not b for a, b in zip(known[0], boxes, strict=True))
        ):
            return self.pooler(features, boxes)
        pooler = self.pooler
        levels = assign_boxes_to_levels(
            boxes,
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
        return _KnownROIAlign.apply(
            known[1],
            convert_boxes_to_pooler_format(boxes),
            [(levels == level).nonzero()[:, 0] for level in range(len(features))],
            list(pooler.level_poolers),
            *features,
        )
