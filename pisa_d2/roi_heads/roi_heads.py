import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import nn

from .fast_rcnn import OBJECT_FIELD, PISAFastRCNNOutputLayers

logger = logging.getLogger(__name__)


def with_object_ids(targets: list[Instances]) -> list[Instances]:
    """
    Copies of the targets, whose objects are numbered through the batch in ``OBJECT_FIELD``.
    Detectron2 hands every ``gt_`` field of a target to the proposals that match it.
    """
    numbered = []
    first = 0
    for target in targets:
        ids = torch.arange(first, first + len(target), device=target.gt_boxes.device)
        copy = Instances(target.image_size, **target.get_fields())
        copy.set(OBJECT_FIELD, ids)
        numbered.append(copy)
        first += len(target)
    return numbered


class PISAMixin(ROIHeads):
    """
    Adds Prime Sample Attention to the ROI heads that it is mixed into, from the left::

        @ROI_HEADS_REGISTRY.register()
        class MyPISAROIHeads(PISAMixin, MyROIHeads):
            pass

    The heads' ``FastRCNNOutputLayers`` becomes a :class:`PISAFastRCNNOutputLayers` of the same
    weights; a box predictor of any other class is left as it is, with a warning. The heads must
    have one ``box_predictor``.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any, **kwargs: Any) -> dict[str, Any]:
        ret = super().from_config(cfg, *args, **kwargs)
        if "box_predictor" not in ret:
            raise TypeError(
                f"{cls.__name__} has no single box_predictor, which PISAMixin replaces. Heads with "
                "one for each stage, such as CascadeROIHeads, are not supported."
            )
        ret["box_predictor"] = cls._with_pisa(cfg, ret["box_predictor"])
        return ret

    @classmethod
    def _with_pisa(cls, cfg: CfgNode, predictor: nn.Module) -> nn.Module:
        if type(predictor) is FastRCNNOutputLayers:
            return PISAFastRCNNOutputLayers.from_stock(cfg, predictor)
        if not isinstance(predictor, PISAFastRCNNOutputLayers):
            logger.warning(
                f"{cls.__name__} keeps its box predictor {type(predictor).__name__}, whose losses "
                "know nothing of MODEL.PISA. Derive it from PISAFastRCNNOutputLayers to use them."
            )
        return predictor

    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        return super().label_and_sample_proposals(proposals, with_object_ids(targets))


@ROI_HEADS_REGISTRY.register()
class PISAROIHeads(PISAMixin, StandardROIHeads):
    """:class:`StandardROIHeads` (box, mask and keypoint) with Prime Sample Attention."""
