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

from ..config import CARL, ISR, NegativeISR, pisa_settings
from ..hlr import at_least_float32, box_iou, hierarchical_local_rank
from ..reweighting import carl_weights, importance_weights, preserve_total
from .box_losses import box_regression_losses
from .ranking import count, image_indices, rank_negatives
from .statistics import log_negatives, log_positives

# The field that carries the matched object to the proposals: unique over the images of a batch.
OBJECT_FIELD = "gt_pisa_object"


class PISAFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    The stock box predictor with the losses of Prime Sample Attention. Parameters and inference
    are those of the stock one, and so are the losses when all parts are switched off.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        isr_p: ISR | None = None,
        isr_n: NegativeISR | None = None,
        carl: CARL | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of the input feature.
            isr_p: reweighting of positives by IoU-HLR, None to leave it out.
            isr_n: reweighting of negatives by Score-HLR, None to leave it out.
            carl: the classification-aware regression loss, None to leave it out.
            kwargs: arguments of :class:`FastRCNNOutputLayers`.
        """
        super().__init__(input_shape, **kwargs)
        self.isr_p = isr_p
        self.isr_n = isr_n
        self.carl = carl

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {**super().from_config(cfg, input_shape), **pisa_settings(cfg)}

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
        if self.isr_p is None and self.isr_n is None and self.carl is None:
            return super().losses(predictions, proposals)

        scores, deltas = predictions
        gt_classes, proposal_boxes, gt_boxes = _gather_targets(proposals, deltas)
        _log_classification_stats(scores, gt_classes)

        # Copies to the host, as the stock losses do; nothing below does.
        positives = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        pos_classes, pos_boxes = gt_classes[positives], proposal_boxes[positives]
        pos_gt_boxes = gt_boxes[positives]
        pos_deltas = self._deltas_of_classes(deltas, positives, pos_classes)
        pos_probs = self._probs(scores[positives]).gather(1, pos_classes[:, None])[:, 0]

        cls_losses = self.classification_losses(scores, gt_classes)
        box_losses = box_regression_losses(
            pos_deltas,
            pos_boxes,
            pos_gt_boxes,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
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
                weights = weights.index_copy(0, positives, pos_weights)
            if self.isr_n is not None:
                negative = gt_classes == self.num_classes
                top_scores, top_boxes = self._top_detections(scores, deltas, proposal_boxes)
                num_samples = [len(p) for p in proposals]
                neg_weights = negative_weights(
                    self.isr_n, top_scores, top_boxes, negative, cls_losses, num_samples
                )
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
        Detectron2 main) before it is averaged.

        Args:
            scores: logits (R, K + 1).
            gt_classes: int64 (R,), in [0, K].

        Returns:
            (R,), float32 at least.
        """
        scores = at_least_float32(scores)
        if not getattr(self, "use_sigmoid_ce", False):
            return F.cross_entropy(scores, gt_classes, reduction="none")
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

    def _deltas_of_classes(self, deltas: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        if deltas.shape[1] == 4:  # class-agnostic
            return deltas[rows]
        return deltas.view(-1, self.num_classes, 4)[rows, classes]

    def _top_detections(
        self, scores: Tensor, deltas: Tensor, proposal_boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Highest foreground probability (R,) and the box (R, 4) regressed for that class."""
        top_scores, classes = self._probs(scores)[:, : self.num_classes].max(dim=1)
        rows = torch.arange(len(scores), device=scores.device)
        top_deltas = self._deltas_of_classes(deltas, rows, classes)
        return top_scores, self.box2box_transform.apply_deltas(top_deltas, proposal_boxes)


def positive_weights(
    isr: ISR, ious: Tensor, objects: Tensor, classes: Tensor, losses: Tensor
) -> Tensor:
    """
    ISR-P: positives weigh by their IoU-HLR in each class over all images of the batch.

    Args:
        isr: gamma and beta.
        ious: floating (P,), IoU of the regressed box with its ground truth.
        objects: int64 (P,), the matched object, unique over the batch.
        classes: int64 (P,), its class.
        losses: floating (P,), classification losses.

    Returns:
        (P,), keeping the sum of the losses.
    """
    if len(ious) == 0:
        return torch.ones_like(losses)
    ranks = hierarchical_local_rank(ious, objects, classes)
    # The largest class has the highest rank: equal ranks of all classes weigh the same.
    weights = importance_weights(ranks, ranks.max() + 1, isr.gamma, isr.beta)
    return preserve_total(weights, losses)


def negative_weights(
    isr: NegativeISR,
    scores: Tensor,
    boxes: Tensor,
    negative: Tensor,
    losses: Tensor,
    num_samples: list[int],
) -> Tensor:
    """
    ISR-N: negatives weigh by their Score-HLR in each image.

    Args:
        isr: gamma, beta and the thresholds.
        scores: floating (R,), highest foreground probability.
        boxes: floating (R, 4), regressed for that class, XYXY in pixels.
        negative: bool (R,).
        losses: floating (R,), classification losses.
        num_samples: number of samples of each image; they add up to R.

    Returns:
        (R,), keeping the sum of the negatives' losses; those of other samples mean nothing.
    """
    if len(scores) == 0:
        return torch.ones_like(losses)
    eligible = negative & (scores > isr.score_thresh)
    ranks = rank_negatives(boxes, scores, eligible, num_samples, isr.nms_thresh)
    images = image_indices(num_samples, scores.device)
    n_max = count(images, negative, len(num_samples)).max()
    weights = importance_weights(ranks, n_max, isr.gamma, isr.beta)
    weights = preserve_total(weights, losses * negative)
    log_negatives(scores, negative, eligible, weights, len(num_samples))
    return weights


def _gather_targets(proposals: list[Instances], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (R,), proposal boxes (R, 4) and boxes of the matched objects (R, 4)."""
    if not proposals:
        return like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, 4), like.new_zeros(0, 4)
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
