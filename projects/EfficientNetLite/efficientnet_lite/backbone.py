"""
EfficientNet-Lite0: an EfficientNet (https://arxiv.org/abs/1905.11946) with ReLU6 and without
squeeze-and-excitation, minus its classifier, as defined in
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torch.nn import functional as F

from pisa_d2.config import check_count

_NORM_EPS = 1e-3  # as the published weights were trained


class FoldedConv2d(Conv2d):
    """
    A convolution and its frozen batch norm, computed as one convolution with a bias.

    Parameters, buffers, values and gradients equal Detectron2's ``Conv2d`` followed by
    ``FrozenBatchNorm2d``: each call scales the weight by the norm, which costs little, instead of
    the feature map, which would cost as much as a depthwise convolution. With stride 2 the padding
    is TensorFlow's, with which the weights were trained: one less on top and at the left.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        relu6: bool = True,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2 if stride == 1 else 0,
            groups=groups,
            bias=False,
            norm=FrozenBatchNorm2d(out_channels, eps=_NORM_EPS),
            activation=F.relu6 if relu6 else None,
        )
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu" if relu6 else "linear")

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: floating (N, in_channels, H, W); H and W even if the stride is 2.

        Returns:
            (N, out_channels, H / stride, W / stride)
        """
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        x = F.conv2d(self.pad(x), weight, bias, self.stride, self.padding, groups=self.groups)
        return x if self.activation is None else self.activation(x, inplace=True)

    def pad(self, x: Tensor) -> Tensor:
        """The part of the padding that the convolution itself cannot do."""
        if self.stride == (1, 1):
            return x
        before, after = (self.kernel_size[0] - 2) // 2, (self.kernel_size[0] - 1) // 2
        return F.pad(x, (before, after, before, after))


class InvertedResidual(nn.Module):
    """Widen, convolve each channel by itself, and narrow (https://arxiv.org/abs/1801.04381)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.expand = nn.Identity() if expansion == 1 else FoldedConv2d(in_channels, wide, 1)
        self.depthwise = FoldedConv2d(wide, wide, kernel_size, stride=stride, groups=wide)
        self.project = FoldedConv2d(wide, out_channels, 1, relu6=False)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: floating (N, in_channels, H, W); H and W even if the stride is 2.

        Returns:
            (N, out_channels, H / stride, W / stride)
        """
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.has_shortcut else out


class _Blocks(NamedTuple):
    """Blocks in a row; the first has the stride."""

    out_channels: int
    kernel_size: int
    stride: int
    num: int


# Each stage halves the resolution. All blocks widen sixfold, except the one in the stem.
_STAGES = {
    "c2": [_Blocks(24, 3, 2, 2)],
    "c3": [_Blocks(40, 5, 2, 2)],
    "c4": [_Blocks(80, 3, 2, 3), _Blocks(112, 5, 1, 3)],
    "c5": [_Blocks(192, 5, 2, 4), _Blocks(320, 3, 1, 1)],
}


class EfficientNetLite0(Backbone):
    """
    Features ``c2`` to ``c5`` of strides 4, 8, 16 and 32, with 24, 40, 112 and 320 channels. All
    batch norms are frozen, so it must start from ImageNet weights to train well. Weights and
    features have the memory format ``channels_last``.
    """

    def __init__(self, *, freeze_at: int = 0) -> None:
        """
        Args:
            freeze_at: parts whose parameters are not trained, as in Detectron2's ResNet: 0 for
                none, 1 for the stem, 2 for the stem and c2, ..., 5 for all.
        """
        super().__init__()
        check_count("MODEL.BACKBONE.FREEZE_AT", freeze_at, 0)
        self.stem = nn.Sequential(
            FoldedConv2d(3, 32, 3, stride=2), InvertedResidual(32, 16, 3, stride=1, expansion=1)
        )
        self._out_features = list(_STAGES)
        self._out_feature_channels, self._out_feature_strides = {}, {}
        channels, stride = 16, 2
        for name, rows in _STAGES.items():
            blocks = []
            for row in rows:
                for i in range(row.num):
                    step = row.stride if i == 0 else 1
                    blocks.append(
                        InvertedResidual(channels, row.out_channels, row.kernel_size, step, 6)
                    )
                    channels, stride = row.out_channels, stride * step
            self.add_module(name, nn.Sequential(*blocks))
            self._out_feature_channels[name], self._out_feature_strides[name] = channels, stride
        parts = list(self.children())
        if freeze_at > len(parts):
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT = {freeze_at!r} is not allowed: it must be in "
                f"[0, {len(parts)}]."
            )
        for part in parts[:freeze_at]:
            part.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: floating (N, 3, H, W), normalised RGB images; H and W divisible by 32.

        Returns:
            Each feature's name to its map (N, channels, H / stride, W / stride).
        """
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        features = {}
        for name in self._out_features:
            x = features[name] = getattr(self, name)(x)
        return features

    @property
    def size_divisibility(self) -> int:
        return 32


@BACKBONE_REGISTRY.register()
def build_efficientnet_lite0_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EfficientNetLite0:
    """
    :class:`EfficientNetLite0` with ``cfg.MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: images do not have 3 channels, or there are fewer parts to freeze.
    """
    if input_shape.channels != 3:
        raise ValueError(
            f"MODEL.PIXEL_MEAN has {input_shape.channels} numbers, but EfficientNet-Lite0 takes "
            "images of 3 channels."
        )
    return EfficientNetLite0(freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _build_fpn(cfg: CfgNode, bottom_up: EfficientNetLite0, top_block: nn.Module) -> FPN:
    names, shapes = cfg.MODEL.FPN.IN_FEATURES, bottom_up.output_shape()
    if not names or not set(names) <= set(shapes):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES = {names!r} is not allowed: name some of {list(shapes)}."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=names,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_efficientnet_lite0_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    A pyramid for R-CNN over ``cfg.MODEL.FPN.IN_FEATURES``, and one more level, by subsampling.

    Raises:
        ValueError: a feature is unknown, or see :func:`build_efficientnet_lite0_backbone`.
    """
    bottom_up = build_efficientnet_lite0_backbone(cfg, input_shape)
    return _build_fpn(cfg, bottom_up, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_efficientnet_lite0_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    A pyramid for RetinaNet over ``cfg.MODEL.FPN.IN_FEATURES``, and two more levels, from c5.

    Raises:
        ValueError: a feature is unknown, or see :func:`build_efficientnet_lite0_backbone`.
    """
    bottom_up = build_efficientnet_lite0_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["c5"].channels
    top_block = LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature="c5")
    return _build_fpn(cfg, bottom_up, top_block)
