"""EfficientNet-Lite0, a small and fast backbone, for Detectron2."""

from .backbone import (
    EfficientNetLite0,
    FoldedConv2d,
    InvertedResidual,
    build_efficientnet_lite0_backbone,
    build_efficientnet_lite0_fpn_backbone,
    build_retinanet_efficientnet_lite0_fpn_backbone,
)
from .convert import convert_weights, find_weights

__all__ = [
    "EfficientNetLite0",
    "FoldedConv2d",
    "InvertedResidual",
    "build_efficientnet_lite0_backbone",
    "build_efficientnet_lite0_fpn_backbone",
    "build_retinanet_efficientnet_lite0_fpn_backbone",
    "convert_weights",
    "find_weights",
]
