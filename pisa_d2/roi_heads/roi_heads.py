import logging
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import nonzero_tuple
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads, StandardROIHeads
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import pisa_settings
from ..matcher import Match, build_proposal_matcher
from ..samplers import Candidates, ProposalSampler, build_proposal_sampler
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
    Adds the samplers of this package and Prime Sample Attention to the ROI heads that it is mixed
    into, from the left::

        @ROI_HEADS_REGISTRY.register()
        class MyPISAROIHeads(PISAMixin, MyROIHeads):
            pass

    The heads' ``FastRCNNOutputLayers`` becomes a :class:`PISAFastRCNNOutputLayers` of the same
    weights; a box predictor of any other class is left as it is, with a warning. The heads must
    have one ``box_predictor``.
    """

    @configurable
    def __init__(
        self,
        *,
        positive_sampler: ProposalSampler,
        negative_sampler: ProposalSampler,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            positive_sampler, negative_sampler: choose among the positives, and the negatives, of
                each image.
            kwargs: arguments of the ROI heads; ``proposal_matcher`` has to be a
                :class:`pisa_d2.matcher.ProposalMatcher`.
        """
        super().__init__(**kwargs)
        self.positive_sampler = positive_sampler
        self.negative_sampler = negative_sampler

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pisa_settings(cfg)  # says so if the keys are missing
        ret = super().from_config(cfg, *args, **kwargs)
        if "box_predictor" not in ret:
            raise TypeError(
                f"{cls.__name__} has no single box_predictor, which PISAMixin replaces. Heads with "
                "one for each stage, such as CascadeROIHeads, are not supported."
            )
        ret["box_predictor"] = cls._with_pisa(cfg, ret["box_predictor"])
        ret["proposal_matcher"] = build_proposal_matcher(cfg)
        ret["positive_sampler"] = build_proposal_sampler(cfg, "POSITIVE_SAMPLER")
        ret["negative_sampler"] = build_proposal_sampler(cfg, "NEGATIVE_SAMPLER")
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

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        As in :class:`ROIHeads`, with the samplers of the config in the place of random draws.
        Proposals get the identity of their object, ``OBJECT_FIELD``, too.
        """
        targets = with_object_ids(targets)
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        chosen, num_positives, num_negatives = [], [], []
        for proposals_per_image, targets_per_image in zip(proposals, targets, strict=True):
            match, classes = self._match(proposals_per_image, targets_per_image)
            positives, negatives = self._sample(proposals_per_image, match, classes)
            indices = torch.cat([positives, negatives])
            samples = proposals_per_image[indices]
            samples.gt_classes = classes[indices]
            if len(targets_per_image) > 0:
                # Every gt_ field of the target goes along, such as masks.
                objects = match.objects[indices]
                for name, value in targets_per_image.get_fields().items():
                    if name.startswith("gt_") and not samples.has(name):
                        samples.set(name, value[objects])
            chosen.append(samples)
            num_positives.append(len(positives))
            num_negatives.append(len(negatives))

        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", np.mean(num_positives))
        storage.put_scalar("roi_head/num_bg_samples", np.mean(num_negatives))
        return chosen

    def _match(self, proposals: Instances, targets: Instances) -> tuple[Match, Tensor]:
        """The match of each proposal of an image, and its class; -1 where it is ignored."""
        match = self.proposal_matcher.match(
            pairwise_iou(targets.gt_boxes, proposals.proposal_boxes)
        )
        if len(targets) == 0:
            return match, torch.full_like(match.objects, self.num_classes)
        classes = targets.gt_classes[match.objects]
        classes = classes.masked_fill(match.labels == 0, self.num_classes)
        return match, classes.masked_fill(match.labels == -1, -1)

    def _sample(self, proposals: Instances, match: Match, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the positives and of the negatives that are chosen in an image."""

        def draw(sampler: ProposalSampler, indices: Tensor, num: int) -> Tensor:
            candidates = Candidates(
                proposals.proposal_boxes.tensor[indices],
                match.ious[indices],
                match.objects[indices],
                classes[indices],
            )
            return indices[sampler(candidates, num)]

        positives = nonzero_tuple((classes != -1) & (classes != self.num_classes))[0]
        negatives = nonzero_tuple(classes == self.num_classes)[0]
        num = self.batch_size_per_image
        positives = draw(self.positive_sampler, positives, int(num * self.positive_fraction))
        negatives = draw(self.negative_sampler, negatives, num - len(positives))
        return positives, negatives


@ROI_HEADS_REGISTRY.register()
class PISAROIHeads(PISAMixin, StandardROIHeads):
    """:class:`StandardROIHeads` (box, mask and keypoint) with Prime Sample Attention."""
