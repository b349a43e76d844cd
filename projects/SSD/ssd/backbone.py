from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

# conv4_3 has larger values than the deeper maps; its L2 norm over the channels starts with this.
_INITIAL_NORM = 20.0


def init_xavier(module: nn.Module) -> None:
    """Initialise the convolutions in ``module`` as SSD was published."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class SSDVGG(Backbone):
    """
    VGG16 with atrous convolutions instead of its first two linear layers, and the layers of SSD
    after them.

    Features, from fine to coarse: ``conv4_3`` (L2-normalised over the channels, with a learned
    scale), ``fc7`` and ``extra1``, ``extra2``, ... Those of ``features`` have the names and the
    order of torchvision's ``vgg16().features`` or, with batch norm, ``vgg16_bn().features``.
    """

    def __init__(
        self, extra_layers: Sequence[Sequence[int]], width: float = 1.0, batch_norm: bool = False
    ) -> None:
        """
        Args:
            extra_layers: a row for each feature map after fc7: channels of its 1x1 convolution,
                then channels, kernel, stride and padding of the next one.
            width: factor of all numbers of channels.
            batch_norm: in the convolutions of VGG16.
        """
        super().__init__()

        def scaled(channels: int) -> int:
            return max(round(channels * width), 1)

        layers = make_layers([c if c == "M" else scaled(c) for c in cfgs["D"]], batch_norm)
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        layers[pools[2]].ceil_mode = True  # 300 pixels give 38 x 38 in conv4_3, as published
        self.features = layers[: pools[4]]
        self.conv4_3_end = pools[3]
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.l2_scale = nn.Parameter(torch.full((scaled(512),), _INITIAL_NORM))

        self.fc = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(scaled(512), scaled(1024), 3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(scaled(1024), scaled(1024), 1),
            nn.ReLU(inplace=True),
        )
        self.extras = nn.ModuleList()
        channels, strides = [scaled(512), scaled(1024)], [8, 16]
        for between, out, kernel, stride, padding in extra_layers:
            self.extras.append(
                nn.Sequential(
                    nn.Conv2d(channels[-1], scaled(between), 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(scaled(between), scaled(out), kernel, stride, padding),
                    nn.ReLU(inplace=True),
                )
            )
            channels.append(scaled(out))
            strides.append(strides[-1] * stride)
        init_xavier(self.fc)
        init_xavier(self.extras)

        names = ["conv4_3", "fc7", *(f"extra{i + 1}" for i in range(len(self.extras)))]
        self._out_features = names
        self._out_feature_channels = dict(zip(names, channels, strict=True))
        self._out_feature_strides = dict(zip(names, strides, strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, 3, H, W), normalised images.

        Returns:
            Each feature's name to its map (N, channels, height, width).
        """
        x = self.features[: self.conv4_3_end](x)
        maps = [self.l2_scale.view(1, -1, 1, 1) * F.normalize(x)]
        x = self.fc(self.features[self.conv4_3_end :](x))
        maps.append(x)
        for extra in self.extras:
            x = extra(x)
            maps.append(x)
        return dict(zip(self._out_features, maps, strict=True))


@BACKBONE_REGISTRY.register()
def build_ssd_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SSDVGG:
    """:class:`SSDVGG` as ``cfg.MODEL.SSD`` says."""
    ssd = cfg.MODEL.SSD
    if input_shape.channels != 3:
        raise ValueError(
            f"MODEL.PIXEL_MEAN has {input_shape.channels} numbers, but VGG16 takes 3 channels."
        )
    if not ssd.WIDTH > 0:
        raise ValueError(f"MODEL.SSD.WIDTH = {ssd.WIDTH!r} is not allowed: it must be above 0.")
    return SSDVGG(ssd.EXTRA_LAYERS, ssd.WIDTH, ssd.BATCH_NORM)
