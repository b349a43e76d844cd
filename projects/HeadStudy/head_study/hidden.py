"""
Hides a share of the labels of training images, to measure what missing labels cost.

``HEAD_STUDY.HIDDEN_LABELS`` is the share. ``HEAD_STUDY.HIDDEN_AS`` is "background", or
"regions" to leave a region to ignore for each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from pisa_d2.engine.seeding import derive_seed
from pisa_d2.regions import TargetsWithRegions

from .cache import View


def check_hidden(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: a key about hidden labels has a value that is not allowed.
    """
    share, hidden_as = cfg.HEAD_STUDY.HIDDEN_LABELS, cfg.HEAD_STUDY.HIDDEN_AS
    if not 0 <= share <= 1:
        raise ValueError(f"HEAD_STUDY.HIDDEN_LABELS = {share} must be between 0 and 1.")
    if hidden_as not in ("background", "regions"):
        raise ValueError(f"HEAD_STUDY.HIDDEN_AS = {hidden_as!r} must be 'background' or 'regions'.")
    if hidden_as == "regions" and not cfg.MODEL.IGNORED_REGIONS.ENABLED:
        raise ValueError(
            "HEAD_STUDY.HIDDEN_AS = 'regions' needs MODEL.IGNORED_REGIONS.ENABLED True."
        )


def hide(targets: Instances, share: float, as_regions: bool, seed: int) -> Instances:
    """
    Args:
        targets: M objects of an image, with ``gt_boxes``.
        share: of them that is hidden, rounded to whole objects.
        seed: of the choice.

    Returns:
        The other objects in their order, with the boxes of the hidden ones as regions to ignore if
        ``as_regions``.
    """
    num_hidden = round(share * len(targets))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    hidden, kept = order[:num_hidden], order[num_hidden:].sort().values
    objects = targets[kept]
    if not as_regions:
        return objects
    regions = targets.gt_boxes[hidden]
    return TargetsWithRegions(targets.image_size, regions, **objects.get_fields())


class HiddenLabels(Sequence[View]):
    """
    Training views without some of their labels. A seed hides the same labels of an image in every
    strategy and epoch.
    """

    def __init__(self, views: Sequence[View], cfg: CfgNode, seed: int) -> None:
        """
        Args:
            cfg: with the keys of the module.
            seed: of the run.
        """
        self.views = views
        self.share = cfg.HEAD_STUDY.HIDDEN_LABELS
        self.as_regions = cfg.HEAD_STUDY.HIDDEN_AS == "regions"
        self.seed = seed

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: Any) -> Any:
        view = self.views[index]
        seed = derive_seed(self.seed, 3, index)
        return view._replace(targets=hide(view.targets, self.share, self.as_regions, seed))
