import functools

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor
from torch.nn import functional as F

from pisa_d2.config import check_count, look_up

from .non_local import NonLocalBlock


def resize(features: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """
    Max-pool a feature map down to a size, or repeat its values up to it.

    Args:
        features: floating (B, C, height, width).
        size: height and width wanted.

    Returns:
        (B, C, *size)
    """
    height, width = features.shape[-2:]
    if height >= size[0] and width >= size[1]:
        return F.adaptive_max_pool2d(features, size)
    return F.interpolate(features, size=size, mode="nearest")


def balance(levels: list[Tensor], refine_level: int) -> Tensor:
    """
    The mean of feature maps, at the size of one of them.

    Args:
        levels: floating (B, C, height, width) each.
        refine_level: index of the one that gives the size.

    Returns:
        (B, C, height, width) of that level.
    """
    size = levels[refine_level].shape[-2:]
    return functools.reduce(torch.add, [resize(level, size) for level in levels]) / len(levels)


class BalancedFeaturePyramid(Backbone):
    """
    A pyramid to each level of which the mean of all levels is added, refined by a non-local block.
    It has the names and shapes of the feature maps of the pyramid that it wraps.
    """

    def __init__(self, pyramid: Backbone, refine_level: int) -> None:
        """
        Args:
            pyramid: a backbone whose feature maps have one number of channels.
            refine_level: the level at whose size the mean is taken, from 0, the finest.

        Raises:
            ValueError: there is no such level, or the levels differ in channels.
        """
        super().__init__()
        shapes = pyramid.output_shape()
        self.levels = sorted(shapes, key=lambda name: shapes[name].stride)
        channels = {name: shapes[name].channels for name in self.levels}
        if len(set(channels.values())) != 1:
            raise ValueError(
                "MODEL.LIBRA.BACKBONE has feature maps of different numbers of channels "
                f"{channels}, which have no mean: name one like 'build_resnet_fpn_backbone'."
            )
        check_count("MODEL.LIBRA.REFINE_LEVEL", refine_level, 0)
        if refine_level >= len(self.levels):
            raise ValueError(
                f"MODEL.LIBRA.REFINE_LEVEL = {refine_level} is not allowed: it must be in "
                f"[0, {len(self.levels) - 1}], of the levels {self.levels}."
            )
        self.refine_level = refine_level
        self.pyramid = pyramid
        self.refine = NonLocalBlock(channels[self.levels[0]])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (B, 3, H, W), normalised images.

        Returns:
            The feature maps of the pyramid, balanced.
        """
        features = self.pyramid(x)
        mean = balance([features[name] for name in self.levels], self.refine_level)
        refined = self.refine(mean)
        return {
            name: feature + resize(refined, feature.shape[-2:])
            for name, feature in features.items()
        }

    @property
    def size_divisibility(self) -> int:
        return self.pyramid.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return getattr(self.pyramid, "padding_constraints", {})  # Detectron2 0.6 has none

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.pyramid.output_shape()


@BACKBONE_REGISTRY.register()
def build_libra_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BalancedFeaturePyramid:
    """
    The backbone ``cfg.MODEL.LIBRA.BACKBONE``, balanced.

    Raises:
        ValueError: there is no such backbone, or see :class:`BalancedFeaturePyramid`.
    """
    name = cfg.MODEL.LIBRA.BACKBONE
    if name == "build_libra_backbone":
        raise ValueError(
            f"MODEL.LIBRA.BACKBONE = {name!r} is not allowed: name the backbone to be balanced."
        )
    build = look_up(BACKBONE_REGISTRY, "MODEL.LIBRA.BACKBONE", name)
    return BalancedFeaturePyramid(build(cfg, input_shape), cfg.MODEL.LIBRA.REFINE_LEVEL)
