"""
Shape shorthand in this module:

    R: number of sampled proposals of all images
    P: number of positives among them
    K: number of foreground classes
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat, nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    _log_classification_stats,
)
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from ..box_losses import box_regression_losses
from ..config import (
    BALANCED_L1,
    CARL,
    ISR,
    BalancedL1,
    NegativeISR,
    balanced_l1_settings,
    focal_gamma,
    pisa_settings,
)
from ..hlr import at_least_float32, box_iou
from ..isr import negative_weights, positive_weights
from ..ranking import largest_count, rank_negatives
from ..reweighting import carl_weights
from ..samplers import Predictions
from ..statistics import log_negatives, log_positives

# The field that carries the matched object to the proposals: unique over the images of a batch.
OBJECT_FIELD = "gt_pisa_object"
# The fields of samples whose sampler ranked them, see ProposalSampler.ranks.
RANK_FIELD = "pisa_rank"
MAX_RANK_FIELD = "pisa_n_max"


class PISAFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    The stock box predictor with the losses of Prime Sample Attention, and with focal loss and
    balanced L1. Parameters and inference are those of the stock one, and so are the losses when
    all parts are switched off.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        isr_p: ISR | None = None,
        isr_n: NegativeISR | None = None,
        carl: CARL | None = None,
        focal_gamma: float | None = None,
        balanced_l1: BalancedL1 | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of the input feature.
            isr_p: reweighting of positives by IoU-HLR, None to leave it out.
            isr_n: reweighting of negatives by Score-HLR, None to leave it out.
            carl: the classification-aware regression loss, None to leave it out.
            focal_gamma: exponent of softmax focal loss, None for cross entropy.
            balanced_l1: its settings, None for the published ones. Counts with the
                ``box_reg_loss_type`` "balanced_l1", which needs a ``smooth_l1_beta`` above 0.
            kwargs: arguments of :class:`FastRCNNOutputLayers`.

        Raises:
            ValueError: ``focal_gamma`` is given with ``use_sigmoid_ce``.
        """
        super().__init__(input_shape, **kwargs)
        if focal_gamma is not None and getattr(self, "use_sigmoid_ce", False):
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.FOCAL_LOSS is of the softmax form: switch USE_SIGMOID_CE off."
            )
        self.isr_p = isr_p
        self.isr_n = isr_n
        self.carl = carl
        self.focal_gamma = focal_gamma
        self.balanced_l1 = balanced_l1

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {
            **super().from_config(cfg, input_shape),
            **pisa_settings(cfg),
            "focal_gamma": focal_gamma(cfg),
            "balanced_l1": balanced_l1_settings(cfg, "ROI_BOX_HEAD", "SMOOTH_L1_BETA"),
        }

    @classmethod
    def from_stock(cls, cfg: CfgNode, stock: FastRCNNOutputLayers) -> "PISAFastRCNNOutputLayers":
        """
        A predictor with the weights and the box transform of a freshly built stock one. Draws
        nothing from the random generator, so that a seed gives one model with PISA or without.
        """
        with torch.random.fork_rng(devices=[]):
            predictor = cls(
                cfg,
                ShapeSpec(channels=stock.cls_score.in_features),
                box2box_transform=stock.box2box_transform,
            )
        predictor.load_state_dict(stock.state_dict())
        return predictor

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: logits (R, K + 1) and deltas (R, K * 4) or (R, 4).
            proposals: the sampled proposals with ``proposal_boxes`` and ``gt_classes``; those of
                an image with objects have ``gt_boxes`` and, for ISR-P, ``OBJECT_FIELD`` too.

        Returns:
            ``loss_cls``, ``loss_box_reg`` and, where CARL is on, ``loss_carl``: scalars under the
            common normaliser R; 0, with a graph, where there is nothing to learn from.
        """
        parts = self.isr_p, self.isr_n, self.carl, self.focal_gamma
        if all(part is None for part in parts) and self.box_reg_loss_type != BALANCED_L1:
            return super().losses(predictions, proposals)

        scores, deltas = predictions
        gt_classes, proposal_boxes, gt_boxes = _gather_targets(proposals, deltas)
        _log_classification_stats(scores, gt_classes)

        # Copies to the host, as the stock losses do; nothing below does.
        positives = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        pos_classes, pos_boxes = gt_classes[positives], proposal_boxes[positives]
        pos_gt_boxes = gt_boxes[positives]
        pos_deltas = self._deltas_of_classes(deltas[positives], pos_classes)
        pos_probs = self._probs(scores[positives]).gather(1, pos_classes[:, None])[:, 0]

        cls_losses = self.classification_losses(scores, gt_classes)
        box_losses = box_regression_losses(
            pos_deltas,
            pos_boxes,
            pos_gt_boxes,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
            self.balanced_l1,
        )
        with torch.no_grad():
            weights = torch.ones_like(cls_losses)
            if self.isr_p is not None:
                ious = box_iou(
                    self.box2box_transform.apply_deltas(pos_deltas, pos_boxes), pos_gt_boxes
                )
                objects = _matched_objects(proposals, scores.device)[positives]
                pos_weights = positive_weights(
                    self.isr_p, ious, objects, pos_classes, cls_losses[positives]
                )
                log_positives(ious, objects, pos_probs, pos_weights)
                weights = weights.index_copy(0, positives, pos_weights.to(weights.dtype))
            if self.isr_n is not None:
                negative = gt_classes == self.num_classes
                top_scores, top_classes = self._top_classes(scores)
                ranked = negative & (top_scores > self.isr_n.score_thresh)
                if proposals and proposals[0].has(RANK_FIELD):
                    ranks = cat([p.get(RANK_FIELD) for p in proposals])
                    n_max = cat([p.get(MAX_RANK_FIELD) for p in proposals])
                else:
                    boxes = self._regressed_boxes(deltas, proposal_boxes, top_classes)
                    num_samples = [len(p) for p in proposals]
                    ranks = rank_negatives(
                        boxes, top_scores, ranked, num_samples, self.isr_n.nms_thresh
                    )
                    n_max = largest_count(negative, num_samples)
                neg_weights = negative_weights(self.isr_n, ranks, n_max, negative, cls_losses)
                log_negatives(top_scores, negative, ranked, neg_weights, len(proposals))
                weights = torch.where(negative, neg_weights, weights)

        normalizer = max(gt_classes.numel(), 1.0)
        losses = {
            "loss_cls": (weights * cls_losses).sum() / normalizer,
            "loss_box_reg": box_losses.sum() / normalizer,
        }
        if self.carl is not None:
            carl = carl_weights(pos_probs, self.carl.gamma, self.carl.beta)
            loss_carl = (carl * box_losses).sum() / normalizer
            losses["loss_carl"] = self.carl.loss_weight * loss_carl
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def classification_losses(self, scores: Tensor, gt_classes: Tensor) -> Tensor:
        """
        The stock classification loss (softmax, or sigmoid with or without federated loss on
        Detectron2 main), or focal loss (https://arxiv.org/abs/1708.02002, over the softmax),
        before it is averaged.

        Args:
            scores: logits (R, K + 1).
            gt_classes: int64 (R,), in [0, K].

        Returns:
            (R,), float32 at least.
        """
        scores = at_least_float32(scores)
        if not getattr(self, "use_sigmoid_ce", False):
            losses = F.cross_entropy(scores, gt_classes, reduction="none")
            if self.focal_gamma is None:
                return losses
            # 1 - p of the true class. The power of an exact 0 may have no finite gradient.
            miss = (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).tiny)
            return miss**self.focal_gamma * losses
        targets = F.one_hot(gt_classes, self.num_classes + 1)[:, :-1].to(scores.dtype)
        losses = F.binary_cross_entropy_with_logits(scores[:, :-1], targets, reduction="none")
        if self.use_fed_loss:
            classes = self.get_fed_loss_classes(
                gt_classes,
                num_fed_loss_classes=self.fed_loss_num_classes,
                num_classes=self.num_classes,
                weight=self.fed_loss_cls_weights,
            )
            in_loss = losses.new_zeros(self.num_classes + 1).index_fill(0, classes, 1)
            losses = losses * in_loss[:-1]
        return losses.sum(dim=1)

    def _probs(self, scores: Tensor) -> Tensor:
        scores = at_least_float32(scores)
        if getattr(self, "use_sigmoid_ce", False):
            return scores.sigmoid()
        return scores.softmax(dim=1)

    @torch.no_grad()
    def predict_candidates(
        self,
        predictions: tuple[Tensor, Tensor],
        proposal_boxes: Tensor,
        gt_boxes: Tensor,
        gt_classes: Tensor,
        with_box_losses: bool,
    ) -> Predictions:
        """
        What samplers go by, of T candidates.

        Args:
            predictions: logits (T, K + 1) and deltas (T, K * 4) or (T, 4).
            proposal_boxes, gt_boxes: floating (T, 4), the second of the matched objects, XYXY in
                pixels.
            gt_classes: int64 (T,), in [0, K], or -1 for candidates that are ignored.
            with_box_losses: if not, all of them are 0.
        """
        scores, deltas = predictions
        positive = (gt_classes >= 0) & (gt_classes < self.num_classes)
        labels = torch.where(gt_classes < 0, self.num_classes, gt_classes)
        cls_losses = self.classification_losses(scores, labels)
        top_scores, top_classes = self._top_classes(scores)
        boxes = self._regressed_boxes(
            deltas, proposal_boxes, torch.where(positive, gt_classes, top_classes)
        )
        box_losses = torch.zeros_like(cls_losses)
        if with_box_losses:
            rows = nonzero_tuple(positive)[0]
            losses = box_regression_losses(
                self._deltas_of_classes(deltas[rows], gt_classes[rows]),
                proposal_boxes[rows],
                gt_boxes[rows],
                self.box2box_transform,
                self.box_reg_loss_type,
                self.smooth_l1_beta,
                self.balanced_l1,
            )
            losses = losses * self.loss_weight.get("loss_box_reg", 1.0)
            box_losses = box_losses.index_copy(0, rows, losses.to(box_losses.dtype))
        ious = box_iou(boxes, gt_boxes)
        return Predictions(cls_losses, box_losses, top_scores, boxes, ious)

    def _top_classes(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Highest foreground probability (R,) and its class (R,)."""
        return self._probs(scores)[:, : self.num_classes].max(dim=1)

    def _deltas_of_classes(self, deltas: Tensor, classes: Tensor) -> Tensor:
        if deltas.shape[1] == 4:  # class-agnostic
            return deltas
        rows = torch.arange(len(deltas), device=deltas.device)
        return deltas.view(-1, self.num_classes, 4)[rows, classes]

    def _regressed_boxes(self, deltas: Tensor, proposal_boxes: Tensor, classes: Tensor) -> Tensor:
        own = self._deltas_of_classes(deltas, classes)
        return self.box2box_transform.apply_deltas(own, proposal_boxes)


def _gather_targets(proposals: list[Instances], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (R,), proposal boxes (R, 4) and boxes of the matched objects (R, 4)."""
    if not proposals:
        no_boxes = torch.zeros(0, 4, device=like.device)
        return like.new_zeros(0, dtype=torch.int64), no_boxes, no_boxes
    classes = cat([p.gt_classes for p in proposals])
    boxes = cat([p.proposal_boxes.tensor for p in proposals])
    # The proposals of an image without objects are all negative: any box serves.
    gt_boxes = cat(
        [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    )
    return classes, boxes, gt_boxes


def _matched_objects(proposals: list[Instances], device: torch.device) -> Tensor:
    """int64 (R,), the object that each proposal was matched to; -1 where the image has none."""
    objects = []
    for p in proposals:
        if p.has(OBJECT_FIELD):
            objects.append(p.get(OBJECT_FIELD))
        elif p.has("gt_boxes"):
            raise KeyError(
                f"The proposals have no {OBJECT_FIELD}, which ISR-P needs: add PISAMixin to the "
                "bases of the ROI heads, before the class that it extends."
            )
        else:
            objects.append(torch.full_like(p.gt_classes, -1))
    return torch.cat(objects) if objects else torch.zeros(0, dtype=torch.int64, device=device)
