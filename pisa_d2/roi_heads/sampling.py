"""Steps from the proposals of a batch to labelled samples: matching, choosing, labelling."""

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..matcher import has_own_rule, match_boxes
from ..ranking import repeated
from ..regions import ignore_inside
from ..samplers import Candidates, Choice
from .sample_fields import IMPORTANCE_FIELD, OBJECT_FIELD


def with_object_ids(targets: list[Instances]) -> list[Instances]:
    """
    Copy the targets and number their objects throughout the batch in ``OBJECT_FIELD``. Detectron2
    passes each ``gt_`` field of a target on to the proposals that match it.
    """
    if not targets:
        return []
    sizes = [len(target) for target in targets]
    numbers = torch.arange(sum(sizes), device=targets[0].gt_boxes.device).split(sizes)
    copies = [target[:] for target in targets]  # keeps their class and all that they carry
    for copy, own in zip(copies, numbers, strict=True):
        copy.set(OBJECT_FIELD, own)
    return copies


def without_step_fields(proposals: list[Instances]) -> list[Instances]:
    """Drop the fields of an earlier step, whose samples may be proposals again."""
    fields = (OBJECT_FIELD, IMPORTANCE_FIELD)
    if not any(p.has(field) for p in proposals for field in fields):
        return proposals
    return [
        Instances(p.image_size, **{k: v for k, v in p.get_fields().items() if k not in fields})
        for p in proposals
    ]


def match_proposals(
    matcher: Matcher,
    boxes: Boxes,
    targets: Instances,
    num_classes: int,
    ignored_ioa_thresh: float | None = None,
) -> Candidates:
    """
    Match the N proposals of an image. Ignored ones have class -1, by the matcher's decision or by
    :func:`pisa_d2.regions.ignore_inside`.

    Args:
        boxes: the proposals.
        targets: the objects of the image.
        num_classes: number of foreground classes, the class of negatives.
        ignored_ioa_thresh: see :func:`pisa_d2.regions.ignore_inside`.
    """
    match = match_boxes(matcher, boxes, targets)
    if len(targets) == 0:
        classes = torch.full_like(match.objects, num_classes)
        if has_own_rule(matcher):  # other matchers ignore nothing here, as in Detectron2
            classes = classes.masked_fill(match.labels == -1, -1)
    else:
        classes = targets.gt_classes[match.objects]
        classes = classes.masked_fill(match.labels == 0, num_classes)
        classes = classes.masked_fill(match.labels == -1, -1)
    classes = ignore_inside(classes, num_classes, boxes.tensor, targets, ignored_ioa_thresh)
    return Candidates(
        boxes.tensor, match.ious, match.objects, classes, negative_range=match.negative_range
    )


def label_samples(
    proposals: Instances,
    candidates: Candidates,
    targets: Instances,
    choice: Choice,
    indices: Tensor,
) -> Instances:
    """
    Select the chosen proposals of an image, and add their classes and the ``gt_`` fields of their
    objects.

    Args:
        proposals: the proposals of the image, with any fields.
        candidates: the proposals, matched to ``targets``.
        targets: the objects of the image, whose ``gt_`` fields are passed on to the proposals.
        choice: the choice among the proposals.
        indices: the indices of ``choice``.
    """
    samples = proposals[indices]
    samples.gt_classes = candidates.classes[indices]
    if choice.negative_importance is not None:
        importance = choice.negative_importance
        of_positives = importance.new_ones(len(choice.positives))
        samples.set(IMPORTANCE_FIELD, torch.cat([of_positives, importance]))
    if len(targets) > 0:
        # Every gt_ field of the targets is passed on, such as masks.
        objects = candidates.objects[indices]
        for name, value in targets.get_fields().items():
            if name.startswith("gt_") and not samples.has(name):
                samples.set(name, value[objects])
    return samples


def rows_of_images(indices: list[Tensor], sizes: list[int]) -> Tensor:
    """
    Turn indices in each image into indices among the rows of all images.

    Args:
        indices: int64, the indices in each image.
        sizes: the number of rows of each image.

    Returns:
        int64, the indices among all rows, image after image.
    """
    if not indices:
        return torch.zeros(0, dtype=torch.int64)
    starts = [sum(sizes[:image]) for image in range(len(sizes))]
    rows = torch.cat(indices)
    return rows + repeated(starts, [len(own) for own in indices], rows.device)


def label_boxes(proposals: Instances, candidates: Candidates, targets: Instances) -> None:
    """
    Give proposals, in place, the classes, boxes and numbers of their objects.

    Args:
        proposals: of an image.
        candidates: the same, matched to ``targets``.
        targets: the objects, see :func:`with_object_ids`.
    """
    proposals.gt_classes = candidates.classes
    if len(targets) > 0:
        proposals.gt_boxes = targets.gt_boxes[candidates.objects]
        proposals.set(OBJECT_FIELD, targets.get(OBJECT_FIELD)[candidates.objects])
    else:
        proposals.gt_boxes = Boxes(torch.zeros_like(candidates.boxes))
        proposals.set(OBJECT_FIELD, torch.full_like(candidates.objects, -1))


def not_ignored(proposals: Instances, num: int) -> Instances:
    """Select the ``num`` proposals that are not ignored, in their order."""
    if num == len(proposals):
        return proposals
    # With a known number this copies nothing to the host; selecting by a mask would.
    return proposals[(proposals.gt_classes < 0).byte().argsort(stable=True)[:num]]
