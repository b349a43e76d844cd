"""The state of one training step of ROI heads."""

from dataclasses import dataclass

from detectron2.structures import Boxes
from torch import Tensor


@dataclass
class PooledFeatures:
    """
    Attributes:
        boxes: the boxes of each image, the very objects that the pooler will be asked for.
        values: floating (R, C, height, width), their features, pooled without gradient.
    """

    boxes: list[Boxes]
    values: Tensor


@dataclass
class Step:
    """
    Made when the heads are called in training, and dropped when they return.

    Attributes:
        features: the feature maps by name, for samplers that need predictions.
        pooled: features of the samples, pooled on the way; None after they were used.
    """

    features: dict[str, Tensor]
    pooled: PooledFeatures | None = None
