"""The fields of sampled proposals, and their values over all images of a batch."""

from typing import NamedTuple

import torch
from detectron2.layers import cat
from detectron2.structures import Instances
from torch import Tensor

# The field that carries the number of the matched object, unique in the batch, to the proposals.
OBJECT_FIELD = "gt_pisa_object"
# The field of samples if their sampler ranked the negatives, see Choice.negative_importance.
IMPORTANCE_FIELD = "pisa_importance"


class SampleFields(NamedTuple):
    """The R sampled proposals of all images; boxes are XYXY in pixels."""

    classes: Tensor  # int64 (R,), K for negatives
    boxes: Tensor  # (R, 4)
    gt_boxes: Tensor  # (R, 4), of the matched objects; any boxes in an image without objects


def gather_fields(proposals: list[Instances], like: Tensor) -> SampleFields:
    """
    Concatenate the fields over the images.

    Args:
        like: gives the device if there are no proposals.
    """
    if not proposals:
        no_boxes = torch.zeros(0, 4, device=like.device)
        return SampleFields(like.new_zeros(0, dtype=torch.int64), no_boxes, no_boxes)
    classes = cat([p.gt_classes for p in proposals])
    boxes = cat([p.proposal_boxes.tensor for p in proposals])
    # All proposals in an image without objects are negative: their ground-truth box is not used.
    gt_boxes = cat(
        [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    )
    return SampleFields(classes, boxes, gt_boxes)


def matched_objects(proposals: list[Instances], device: torch.device) -> Tensor:
    """
    Concatenate the numbers of the matched objects.

    Proposals of heads without PISAMixin do not carry them. Their objects are identified by class
    and box: two objects in one image that are equal in both become one, and the host waits for the
    GPU.

    Returns:
        int64 (R,); -1 in images without objects.
    """
    objects: list[Tensor] = []
    num_before = 0
    for p in proposals:
        if p.has(OBJECT_FIELD):
            objects.append(p.get(OBJECT_FIELD))
        elif p.has("gt_boxes"):
            keys = torch.cat([p.gt_boxes.tensor, p.gt_classes[:, None]], dim=1)
            objects.append(num_before + keys.unique(dim=0, return_inverse=True)[1])
        else:
            objects.append(torch.full_like(p.gt_classes, -1))
        num_before += len(p)
    return torch.cat(objects) if objects else torch.zeros(0, dtype=torch.int64, device=device)
