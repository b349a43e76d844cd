"""
Regions to ignore: crowds, difficult objects and unlabelled parts of an image. A proposal or anchor
inside a region is ignored unless it is positive.

Shape shorthand in this module:

    N: number of boxes in an image, proposals or anchors
    M: number of regions in the image
"""

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    ProposalNetwork,
    SemanticSegmentor,
)
from detectron2.structures import Boxes, Instances, pairwise_ioa
from detectron2.utils.logger import log_first_n
from torch import Tensor


class TargetsWithRegions(Instances):
    """
    The objects of an image with its regions to ignore, which stay when objects are selected or
    moved to another device.
    """

    def __init__(self, image_size: tuple[int, int], regions: Boxes, **fields: Any) -> None:
        """
        Args:
            image_size: height and width in pixels.
            regions: M boxes, XYXY in pixels.
            fields: the fields of the objects, see :class:`Instances`.
        """
        super().__init__(image_size, **fields)
        self._regions = regions  # with the underscore it is no field

    @property
    def ignored_regions(self) -> Boxes:
        """The M regions of the image."""
        return self._regions

    def to(self, *args: Any, **kwargs: Any) -> "TargetsWithRegions":
        return self._with(super().to(*args, **kwargs), self._regions.to(*args, **kwargs))

    def __getitem__(self, item: Any) -> "TargetsWithRegions":
        return self._with(super().__getitem__(item), self._regions)

    @staticmethod
    def _with(objects: Instances, regions: Boxes) -> "TargetsWithRegions":
        return TargetsWithRegions(objects.image_size, regions, **objects.get_fields())


def inside_regions(boxes: Tensor, regions: Tensor, ioa_thresh: float) -> Tensor:
    """
    Find the boxes with at least a given share of their area inside one region.

    Args:
        boxes: floating (N, 4), XYXY.
        regions: floating (M, 4), XYXY.
        ioa_thresh: the share of a box's own area, above 0.

    Returns:
        bool (N,); False for a box without area.
    """
    return (pairwise_ioa(Boxes(regions), Boxes(boxes)) >= ioa_thresh).any(dim=0)


def ignore_inside(
    labels: Tensor, negative: int, boxes: Tensor, targets: Instances, ioa_thresh: float | None
) -> Tensor:
    """
    Ignore the negatives that lie inside a region of the image.

    Args:
        labels: integer (N,).
        negative: the label of negatives.
        boxes: floating (N, 4), XYXY in pixels.
        targets: the objects of the image, with its regions.
        ioa_thresh: see :func:`inside_regions`; None to ignore nothing.

    Returns:
        (N,), the labels, with -1 for these negatives.
    """
    if ioa_thresh is None:
        return labels
    regions = regions_of(targets)
    if len(regions) == 0:
        return labels
    inside = inside_regions(boxes, regions.tensor, ioa_thresh)
    return labels.masked_fill(inside & (labels == negative), -1)


def regions_of(targets: Instances) -> Boxes:
    """Return the regions of an image. If they were dropped, warn once and return none."""
    if isinstance(targets, TargetsWithRegions):
        return targets.ignored_regions
    _warn_once(
        "MODEL.IGNORED_REGIONS.ENABLED has no effect: the data loader drops the regions, so that "
        "targets arrive without them. Build it with pisa_d2.engine.build_train_loader, or wrap "
        "its mapper: pisa_d2.data.KeepRegions(mapper)."
    )
    return Boxes(targets.gt_boxes.tensor.new_zeros(0, 4))


def warn_of_gaps(cfg: CfgNode) -> None:
    """
    Warn once, if regions are to be ignored, about the parts of the model that do not ignore them:
    their class does not have ``ignores_regions = True``.
    """
    if not cfg.MODEL.IGNORED_REGIONS.ENABLED:
        return
    used = {"META_ARCHITECTURE": META_ARCH_REGISTRY}
    model: Any = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if isinstance(model, type) and issubclass(model, SemanticSegmentor):
        return
    if isinstance(model, type) and issubclass(model, (GeneralizedRCNN, ProposalNetwork)):
        used = {"PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY}
        if issubclass(model, GeneralizedRCNN):
            used["ROI_HEADS.NAME"] = ROI_HEADS_REGISTRY
    gaps = []
    for key, registry in used.items():
        node, _, leaf = key.rpartition(".")
        name = (cfg.MODEL[node] if node else cfg.MODEL)[leaf]
        # Proposals from a file are not trained.
        if name != "PrecomputedProposals" and not _ignores_regions(registry.get(name)):
            gaps.append(f"MODEL.{key} = {name!r}")
    if gaps:
        _warn_once(
            f"MODEL.IGNORED_REGIONS.ENABLED has no effect on {' and '.join(gaps)}, which takes "
            "negatives from the regions: use PISARPN, heads with PISAMixin (such as "
            "PISAROIHeads) or PISARetinaNet."
        )


def _ignores_regions(part: Any) -> bool:
    return getattr(part, "ignores_regions", False)


def _warn_once(text: str) -> None:
    log_first_n(logging.WARNING, text, name=__name__, key="message")
