import re
from collections.abc import Mapping, Sequence

from torch import Tensor

# VGG16 up to conv4_3, which torchvision's SSD keeps in one module, has 23 layers.
_CONV4_3_LAYERS = 23
# Patterns of torchvision's names, and ours.
_RENAMED = [
    (r"features\.(\d+)\.(.+)", r"backbone.features.\1.\2"),  # a classifier's
    (r"backbone\.features\.(\d+)\.(.+)", r"backbone.features.\1.\2"),
    (r"backbone\.scale_weight", "backbone.l2_scale"),
    (r"backbone\.extra\.0\.7\.(\d+)\.(.+)", r"backbone.fc.\1.\2"),
    (r"head\.classification_head\.module_list\.(\d+)\.(.+)", r"head.cls_score.\1.\2"),
    (r"head\.regression_head\.module_list\.(\d+)\.(.+)", r"head.bbox_pred.\1.\2"),
]


def convert_torchvision(
    state_dict: Mapping[str, Tensor], num_boxes: Sequence[int], labels: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """
    Weights of torchvision for :class:`SSD`. Where torchvision's background is class 0, ours is the
    last.

    Args:
        state_dict: of ``ssd300_vgg16``, or of ``vgg16`` (or, for batch norm, ``vgg16_bn``), whose
            trunk alone is used.
        num_boxes: default boxes at a place of each feature map.
        labels: torchvision's labels of our classes 0, 1, ...; None takes all from 1 up.

    Returns:
        The part of a state dict of :class:`SSD` that there are weights for.
    """
    converted = {}
    for name, weight in state_dict.items():
        new_name = _new_name(name)
        if new_name is None:
            continue
        if new_name.startswith("head.cls_score."):
            num = num_boxes[int(new_name.split(".")[2])]
            by_class = weight.unflatten(0, (num, -1))
            chosen = range(1, by_class.shape[1]) if labels is None else labels
            weight = by_class[:, [*chosen, 0]].flatten(0, 1)
        converted[new_name] = weight
    return converted


def _new_name(name: str) -> str | None:
    for pattern, new_name in _RENAMED:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new_name, name)
    if match := re.fullmatch(r"backbone\.extra\.0\.(\d+)\.(.+)", name):
        return f"backbone.features.{int(match[1]) + _CONV4_3_LAYERS}.{match[2]}"
    if match := re.fullmatch(r"backbone\.extra\.(\d+)\.(.+)", name):
        return f"backbone.extras.{int(match[1]) - 1}.{match[2]}"
    return None  # the linear layers of a classifier
