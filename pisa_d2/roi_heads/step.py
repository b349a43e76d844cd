"""The state of one training step of ROI heads."""

from dataclasses import dataclass

from detectron2.structures import Boxes
from torch import Tensor


@dataclass
class PooledFeatures:
    """
    Features of the samples of a step.

    Attributes:
        boxes: the boxes of each image, the very objects that the pooler will be called with.
        values: floating (R, C, height, width), their features, pooled without gradient.
    """

    boxes: list[Boxes]
    values: Tensor


@dataclass
class Step:
    """
    State that lives from the call of the heads in training until they return.

    Attributes:
        features: the feature maps by name, for samplers that need predictions.
        pooled: features of the samples, None before they are pooled and after they are used.
    """

    features: dict[str, Tensor]
    pooled: PooledFeatures | None = None
