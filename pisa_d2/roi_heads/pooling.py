"""Box features that are pooled once without gradient and then trained on."""

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

from ..ordering import at_least_float32
from .step import Step


class _KnownROIAlign(torch.autograd.Function):
    """ROIAlign with a precomputed output: only the backward pass runs."""

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


class ReusingPooler(ROIPooler):
    """
    A :class:`ROIPooler` that reuses the features that a step has already pooled; otherwise it pools
    as usual. :meth:`adopt` changes the class of Detectron2's pooler, which keeps its state.

    Attributes:
        step: the current training step, None outside of one.
    """

    step: Step | None = None

    @classmethod
    def adopt(cls, pooler: nn.Module) -> None:
        """Make a pooler reuse features if it is Detectron2's own."""
        if type(pooler) is ROIPooler:
            pooler.__class__ = cls

    def _has_backward(self) -> bool:
        # Deterministic ROIAlign, which torch can be set to use, has no backward to call.
        return (
            all(isinstance(layer, ROIAlign) for layer in self.level_poolers)
            and hasattr(torch.ops.torchvision, "_roi_align_backward")
            and not torch.are_deterministic_algorithms_enabled()
        )

    # Not in forward, which must stay exportable.
    def __call__(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        known = None if self.step is None else self.step.pooled
        if (
            self.step is None
            or known is None
            or not self._has_backward()
            or len(known.boxes) != len(boxes)
            or any(a is not b for a, b in zip(known.boxes, boxes, strict=True))
        ):
            return super().__call__(features, boxes)
        self.step.pooled = None  # to be used once
        levels = assign_boxes_to_levels(
            boxes, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        return _KnownROIAlign.apply(
            known.values,
            convert_boxes_to_pooler_format(boxes),
            [(levels == level).nonzero()[:, 0] for level in range(len(features))],
            list(self.level_poolers),
            *features,
        )
