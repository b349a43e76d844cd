import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import cat
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads, StandardROIHeads
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import cascade_stages, pisa_settings
from ..matcher import ProposalMatcher, build_proposal_matcher
from ..samplers import Candidates, Predictions, ProposalSampler, build_proposal_sampler
from .fast_rcnn import OBJECT_FIELD, PISAFastRCNNOutputLayers
from .pooling import ReusingPooler
from .sampling import choose, choose_jointly, is_joint, is_positive, take, with_object_ids
from .scoring import BoxBranch, predict_all

logger = logging.getLogger(__name__)


def _without_pisa(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    for part in ("ISR_P", "ISR_N", "CARL"):
        cfg.MODEL.PISA[part].ENABLED = False
    return cfg


class PISAMixin(ROIHeads):
    """
    Adds the samplers of this package and Prime Sample Attention to the ROI heads that it is mixed
    into, from the left::

        @ROI_HEADS_REGISTRY.register()
        class MyPISAROIHeads(PISAMixin, MyROIHeads):
            pass

    The heads extend :class:`StandardROIHeads`, :class:`Res5ROIHeads` or :class:`CascadeROIHeads`.
    Each ``FastRCNNOutputLayers`` of theirs becomes a :class:`PISAFastRCNNOutputLayers` of the same
    weights; a box predictor of any other class is left as it is, with a warning.

    In a cascade the samplers choose among the proposals of the first stage; the others train on
    all boxes of the stage before, as in Detectron2, and have ISR and CARL too.
    """

    def __init__(
        self,
        *args: Any,
        positive_sampler: ProposalSampler | None = None,
        negative_sampler: ProposalSampler | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: those of the ROI heads, that is ``cfg`` and ``input_shape``, or their
                parts. Of these ``proposal_matcher``, or each of ``proposal_matchers``, has to be a
                :class:`pisa_d2.matcher.ProposalMatcher`.
            positive_sampler, negative_sampler: choose among the positives, and the negatives, of
                each image. With ``cfg``, None for those that it names.

        Raises:
            TypeError: a sampler is missing, or one needs predictions and the heads have a box
                predictor of their own.
        """
        super().__init__(*args, **kwargs)
        cfg = args[0] if args else kwargs.get("cfg")
        if cfg is not None:
            positive_sampler = positive_sampler or build_proposal_sampler(cfg, "POSITIVE_SAMPLER")
            negative_sampler = negative_sampler or build_proposal_sampler(cfg, "NEGATIVE_SAMPLER")
        if positive_sampler is None or negative_sampler is None:
            name = type(self).__name__
            raise TypeError(f"{name} needs a positive_sampler and a negative_sampler.")
        self.positive_sampler = positive_sampler
        self.negative_sampler = negative_sampler
        self._features: dict[str, Tensor] | None = None
        samplers = [s for s in (positive_sampler, negative_sampler) if s.needs_predictions]
        self._needs_predictions = len(samplers) > 0
        if self._needs_predictions:
            predictor = self._box_branch().predictor
            if not isinstance(predictor, PISAFastRCNNOutputLayers):
                raise TypeError(
                    f"{type(samplers[0]).__name__} needs the losses of a box predictor derived "
                    f"from PISAFastRCNNOutputLayers, which {type(predictor).__name__} is not."
                )
            name = "pooler" if isinstance(self, Res5ROIHeads) else "box_pooler"
            setattr(self, name, ReusingPooler(getattr(self, name)))

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pisa_settings(cfg)  # says so if the keys are missing
        ret = super().from_config(cfg, *args, **kwargs)
        if "box_predictors" in ret:  # a cascade
            predictors = ret["box_predictors"]
            ret["box_predictors"] = [
                cls._with_pisa(cfg if on else _without_pisa(cfg), predictor)
                for on, predictor in zip(
                    cascade_stages(cfg, len(predictors)), predictors, strict=True
                )
            ]
            ret["proposal_matchers"] = cls._matchers_of_stages(cfg)
        else:
            ret["box_predictor"] = cls._with_pisa(cfg, ret["box_predictor"])
            ret["proposal_matcher"] = build_proposal_matcher(cfg)
        # Heads that are extended may pass on cfg and nothing else, as those of DensePose do, so the
        # constructor above reads the samplers from cfg. A @configurable one before it hands it
        # parts instead.
        before = cls.__mro__[: cls.__mro__.index(PISAMixin)]
        if any(hasattr(vars(c).get("__init__"), "__wrapped__") for c in before):
            ret["positive_sampler"] = build_proposal_sampler(cfg, "POSITIVE_SAMPLER")
            ret["negative_sampler"] = build_proposal_sampler(cfg, "NEGATIVE_SAMPLER")
        return ret

    @classmethod
    def _matchers_of_stages(cls, cfg: CfgNode) -> list[ProposalMatcher]:
        matchers = []
        for iou in cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS, cfg.MODEL.ROI_HEADS.IOU_LABELS = [iou], [0, 1]
            matchers.append(build_proposal_matcher(cfg))
        return matchers

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

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As in :class:`ROIHeads`."""
        with self._features_at_hand(features):
            return super().forward(images, features, proposals, targets)

    def choose_samples(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """What a training step on these would sample; the arguments are those of ``forward``."""
        with self._features_at_hand(features):
            return self.label_and_sample_proposals(proposals, targets)

    @contextmanager
    def _features_at_hand(self, features: dict[str, Tensor]) -> Iterator[None]:
        # label_and_sample_proposals is not given the features, which samplers may need.
        if not (self.training and self._needs_predictions):
            yield
            return
        self._features = features
        try:
            yield
        finally:
            self._features = None
            self._box_branch().pooler.forget()

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        As in :class:`ROIHeads`, with the samplers of the config in the place of random draws.
        Proposals get the identity of their object, ``OBJECT_FIELD``, too.

        Raises:
            RuntimeError: a sampler needs predictions, and this is called neither by ``forward``
                nor by ``choose_samples``.
        """
        targets = with_object_ids(targets)
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        pairs = list(zip(proposals, targets, strict=True))
        batch = [self._match(self.proposal_matcher, *pair) for pair in pairs]
        pooled = None
        if self._needs_predictions:
            batch, pooled = self._with_predictions(batch, pairs)
        num = self.batch_size_per_image
        if is_joint(self.positive_sampler):
            num *= len(batch)
            choices = choose_jointly(batch, self.positive_sampler, num, self.num_classes)
        else:
            samplers = self.positive_sampler, self.negative_sampler
            quota = num, self.positive_fraction
            choices = [choose(c, *samplers, *quota, self.num_classes) for c in batch]

        sampled = [
            take(choice, candidates, *pair)
            for choice, candidates, pair in zip(choices, batch, pairs, strict=True)
        ]
        if pooled is not None:
            parts = pooled.split([len(p) for p in proposals])
            kept = cat([part[c.indices] for part, c in zip(parts, choices, strict=True)])
            self._box_branch().pooler.remember([p.proposal_boxes for p in sampled], kept)

        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", np.mean([len(c.positives) for c in choices]))
        storage.put_scalar("roi_head/num_bg_samples", np.mean([len(c.negatives) for c in choices]))
        return sampled

    def _match(
        self, matcher: ProposalMatcher, proposals: Instances, targets: Instances
    ) -> Candidates:
        """All proposals of an image, of class -1 where they are ignored."""
        boxes = proposals.proposal_boxes
        match = matcher.match(pairwise_iou(targets.gt_boxes, boxes))
        if len(targets) == 0:
            classes = torch.full_like(match.objects, self.num_classes)
        else:
            classes = targets.gt_classes[match.objects]
            classes = classes.masked_fill(match.labels == 0, self.num_classes)
            classes = classes.masked_fill(match.labels == -1, -1)
        return Candidates(boxes.tensor, match.ious, match.objects, classes)

    def _with_predictions(
        self, batch: list[Candidates], pairs: list[tuple[Instances, Instances]]
    ) -> tuple[list[Candidates], Tensor | None]:
        """The candidates with predictions, by one pass; and the pooled features of all, or None."""
        if self._features is None:
            raise RuntimeError(
                f"{type(self.positive_sampler).__name__} or {type(self.negative_sampler).__name__} "
                "needs features: call forward or choose_samples of the ROI heads instead of "
                "label_and_sample_proposals."
            )
        branch = self._box_branch()
        outputs, pooled = predict_all(
            branch,
            [self._features[name] for name in branch.in_features],
            [p.proposal_boxes for p, _ in pairs],
        )
        gt_boxes = [
            target.gt_boxes.tensor[candidates.objects] if len(target) else candidates.boxes
            for candidates, (_, target) in zip(batch, pairs, strict=True)
        ]
        predictions = branch.predictor.predict_candidates(
            outputs,
            cat([candidates.boxes for candidates in batch]),
            cat(gt_boxes),
            cat([candidates.classes for candidates in batch]),
            with_box_losses=is_joint(self.positive_sampler),
        )
        sizes = [len(candidates.ious) for candidates in batch]
        of_images = zip(*(values.split(sizes) for values in predictions), strict=True)
        return [
            candidates._replace(predictions=Predictions(*values))
            for candidates, values in zip(batch, of_images, strict=True)
        ], pooled

    def _box_branch(self) -> BoxBranch:
        """What predicts the boxes of proposals, in the first stage of a cascade."""
        if isinstance(self, Res5ROIHeads):
            return BoxBranch(
                self.in_features,
                self.pooler,
                self.res5,
                lambda x: x.mean(dim=[2, 3]),
                self.box_predictor,
            )
        head, predictor = self.box_head, self.box_predictor
        if isinstance(self, CascadeROIHeads):
            head, predictor = head[0], predictor[0]
        return BoxBranch(self.box_in_features, self.box_pooler, head, None, predictor)

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """
        As in :class:`CascadeROIHeads`, for a later stage. Proposals get the identity of their
        object, ``OBJECT_FIELD``, too.
        """
        num_positives = []
        for p, target in zip(proposals, with_object_ids(targets), strict=True):
            candidates = self._match(self.proposal_matchers[stage], p, target)
            p.gt_classes = candidates.classes
            if len(target) > 0:
                p.gt_boxes = target.gt_boxes[candidates.objects]
                p.set(OBJECT_FIELD, target.get(OBJECT_FIELD)[candidates.objects])
            else:
                p.gt_boxes = Boxes(torch.zeros_like(candidates.boxes))
                p.set(OBJECT_FIELD, torch.full_like(candidates.objects, -1))
            num_positives.append(is_positive(candidates.classes, self.num_classes).sum())
        mean = torch.stack(num_positives).float().mean().item()
        num = np.mean([len(p) for p in proposals])
        storage = get_event_storage()
        storage.put_scalar(f"stage{stage}/roi_head/num_fg_samples", mean)
        storage.put_scalar(f"stage{stage}/roi_head/num_bg_samples", num - mean)
        return proposals


@ROI_HEADS_REGISTRY.register()
class PISAROIHeads(PISAMixin, StandardROIHeads):
    """:class:`StandardROIHeads` (box, mask and keypoint) with Prime Sample Attention."""


@ROI_HEADS_REGISTRY.register()
class PISARes5ROIHeads(PISAMixin, Res5ROIHeads):
    """:class:`Res5ROIHeads` (C4 models) with Prime Sample Attention."""


@ROI_HEADS_REGISTRY.register()
class PISACascadeROIHeads(PISAMixin, CascadeROIHeads):
    """:class:`CascadeROIHeads` with Prime Sample Attention in every stage."""
