from torch import Tensor, nn

from .backbone import init_xavier


class SSDHead(nn.Module):
    """One 3x3 convolution for classes and one for boxes on each feature map."""

    def __init__(self, in_channels: list[int], num_boxes: list[int], num_classes: int) -> None:
        """
        Args:
            in_channels: of each feature map.
            num_boxes: default boxes at a place of each feature map.
            num_classes: foreground classes.
        """
        super().__init__()
        levels = list(zip(in_channels, num_boxes, strict=True))
        self.cls_score = nn.ModuleList(
            nn.Conv2d(channels, num * (num_classes + 1), 3, padding=1) for channels, num in levels
        )
        self.bbox_pred = nn.ModuleList(
            nn.Conv2d(channels, num * 4, 3, padding=1) for channels, num in levels
        )
        init_xavier(self)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and deltas of each feature map (N, boxes at a place * (K + 1) or 4, H, W)."""
        logits = [conv(x) for conv, x in zip(self.cls_score, features, strict=True)]
        deltas = [conv(x) for conv, x in zip(self.bbox_pred, features, strict=True)]
        return logits, deltas
