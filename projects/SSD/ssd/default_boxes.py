from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList


class DefaultBoxes(nn.Module):
    """torchvision's default boxes for feature maps of one square image size."""

    def __init__(
        self,
        image_size: int,
        scales: Sequence[float],
        steps: Sequence[int],
        aspect_ratios: Sequence[Sequence[float]],
    ) -> None:
        """
        Args:
            image_size: side of the image in pixels.
            scales: fractions of the side, one a feature map and one more.
            steps: pixels between neighbouring centres, one a feature map.
            aspect_ratios: of each feature map, those beside 1.

        Raises:
            ValueError: the numbers of entries do not fit together.
        """
        super().__init__()
        if not len(scales) - 1 == len(steps) == len(aspect_ratios):
            raise ValueError(
                "MODEL.SSD: STEPS and ASPECT_RATIOS need one entry for each feature map, and "
                f"SCALES one more; they have {len(steps)}, {len(aspect_ratios)} and {len(scales)}."
            )
        self.image_size = image_size
        self.generator = DefaultBoxGenerator(
            [list(ratios) for ratios in aspect_ratios], scales=list(scales), steps=list(steps)
        )

    def num_boxes(self) -> list[int]:
        """Number of default boxes at a place of each feature map."""
        return self.generator.num_anchors_per_location()

    def forward(self, features: list[Tensor]) -> Tensor:
        """
        Args:
            features: maps (N, channels, H, W), from fine to coarse.

        Returns:
            float32 (R, 4), XYXY in pixels of the square image; places in the order of (H, W), all
            boxes of a place together. They may reach out of the image.
        """
        side, device = self.image_size, features[0].device
        # Only sizes are read; in half precision, coordinates would be off by an eighth of a pixel.
        image = ImageList(torch.empty(1, 0, side, side, device=device), [(side, side)])
        maps = [torch.empty(f.shape[-2:], device=device) for f in features]
        return self.generator(image, maps)[0]
