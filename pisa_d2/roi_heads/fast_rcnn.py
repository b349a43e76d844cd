"""
Shape shorthand in this module:

    R: number of sampled proposals of all images
    P: number of positives among them
    K: number of foreground classes
"""

from numbers import Real
from typing import Any, NamedTuple

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

from ..attention import Positives, carl_loss, isr_p_weights
from ..box_losses import BALANCED_L1, box_regression_losses
from ..boxes import box_iou
from ..config import balanced_l1_settings, focal_gamma, pisa_settings
from ..isr import negative_weights
from ..ordering import at_least_float32
from ..ranking import largest_count, rank_negatives
from ..reweighting import importance
from ..samplers import Predictions
from ..samplers.candidates import is_positive
from ..scalars import log_negatives
from ..settings import CARL, ISR, BalancedL1, NegativeISR, check_positive, check_range

# The field that carries the matched object to the proposals: unique over the images of a batch.
OBJECT_FIELD = "gt_pisa_object"
# The field of samples whose sampler ranked the negatives, see Choice.negative_importance.
IMPORTANCE_FIELD = "pisa_importance"


class _Samples(NamedTuple):
    """The sampled proposals of all images; boxes are XYXY in pixels."""

    classes: Tensor  # int64 (R,), K for negatives
    boxes: Tensor  # (R, 4)
    gt_boxes: Tensor  # (R, 4), of the matched objects; anything in an image without objects


class PISAFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    The stock box predictor with the losses of Prime Sample Attention, and with focal loss and
    balanced L1. Parameters and inference are those of the stock one, and so are the losses, to the
    last bit, when all parts are switched off.

    Attributes:
        adopted: whether this was a stock predictor, to which ROI heads gave their settings.
    """

    adopted = False

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        isr_p: ISR | None = ISR(),
        isr_n: NegativeISR | None = NegativeISR(),
        carl: CARL | None = CARL(),
        focal_gamma: float | None = None,
        balanced_l1: BalancedL1 | None = None,
        loss_weight: float | dict[str, float] = 1.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of the input feature.
            isr_p: reweighting of positives by IoU-HLR, None to leave it out.
            isr_n: reweighting of negatives by Score-HLR, None to leave it out.
            carl: the classification-aware regression loss, None to leave it out.
            focal_gamma: exponent of softmax focal loss, None for cross entropy.
            balanced_l1: settings of the ``box_reg_loss_type`` "balanced_l1", None for the
                published ones.
            loss_weight: factor of all losses, or of each by its name.
            kwargs: arguments of :class:`FastRCNNOutputLayers`.

        Raises:
            ValueError: ``focal_gamma`` is given with ``use_sigmoid_ce``, or ``smooth_l1_beta`` is
                not above 0 with balanced L1.
        """
        if isinstance(loss_weight, Real):
            names = ("loss_cls", "loss_box_reg", "loss_carl")
            loss_weight = dict.fromkeys(names, float(loss_weight))
        super().__init__(input_shape, loss_weight=loss_weight, **kwargs)
        self.set_losses(
            isr_p=isr_p,
            isr_n=isr_n,
            carl=carl,
            focal_gamma=focal_gamma,
            balanced_l1=balanced_l1,
        )

    def set_losses(
        self,
        *,
        isr_p: ISR | None,
        isr_n: NegativeISR | None,
        carl: CARL | None,
        focal_gamma: float | None = None,
        balanced_l1: BalancedL1 | None = None,
    ) -> None:
        """Set what :meth:`__init__` has in addition to the stock predictor's arguments."""
        if focal_gamma is not None:
            check_range("focal_gamma", focal_gamma, 0)
            if getattr(self, "use_sigmoid_ce", False):
                raise ValueError(
                    "MODEL.ROI_BOX_HEAD.FOCAL_LOSS is of the softmax form: switch USE_SIGMOID_CE "
                    "off."
                )
        if self.box_reg_loss_type == BALANCED_L1:
            reason = f", since box_reg_loss_type is {BALANCED_L1!r}"
            check_positive("smooth_l1_beta", self.smooth_l1_beta, reason)
        self.isr_p = isr_p
        self.isr_n = isr_n
        self.carl = carl
        self.focal_gamma = focal_gamma
        self.balanced_l1 = balanced_l1

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {**super().from_config(cfg, input_shape), **predictor_settings(cfg)}

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
        if self._has_stock_losses():
            return super().losses(predictions, proposals)
        samples = _gather_samples(proposals, predictions[1])
        _log_classification_stats(predictions[0], samples.classes)
        cls_losses = self.classification_losses(predictions[0], samples.classes)
        # A copy to the host, as the stock losses make; nothing else here is.
        rows = nonzero_tuple(is_positive(samples.classes, self.num_classes))[0]
        positives = self._positives(rows, predictions, samples, proposals, cls_losses)
        weights = self._isr_weights(rows, positives, predictions, samples, proposals, cls_losses)

        normalizer = max(samples.classes.numel(), 1.0)
        losses = {
            "loss_cls": (weights * cls_losses).sum() / normalizer,
            "loss_box_reg": positives.box_losses.sum() / normalizer,
        }
        if self.carl is not None:
            losses["loss_carl"] = carl_loss(self.carl, positives) / normalizer
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def positives(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> Positives:
        """The positives as :meth:`losses` weighs them, from the same arguments."""
        samples = _gather_samples(proposals, predictions[1])
        cls_losses = self.classification_losses(predictions[0], samples.classes)
        rows = nonzero_tuple(is_positive(samples.classes, self.num_classes))[0]
        return self._positives(rows, predictions, samples, proposals, cls_losses)

    def _has_stock_losses(self) -> bool:
        own = PISAFastRCNNOutputLayers.classification_losses
        return (
            all(part is None for part in (self.isr_p, self.isr_n, self.carl, self.focal_gamma))
            and self.box_reg_loss_type != BALANCED_L1
            and type(self).classification_losses is own
        )

    def _positives(
        self,
        rows: Tensor,
        predictions: tuple[Tensor, Tensor],
        samples: _Samples,
        proposals: list[Instances],
        cls_losses: Tensor,
    ) -> Positives:
        scores, deltas = predictions
        classes, boxes, gt_boxes = (values[rows] for values in samples)
        own_deltas = self._deltas_of_classes(deltas[rows], classes)
        needs_objects = self.isr_p is not None
        return Positives(
            boxes=boxes,
            gt_boxes=gt_boxes,
            objects=_matched_objects(proposals, deltas.device)[rows] if needs_objects else rows,
            classes=classes,
            deltas=own_deltas,
            probs=self._probs(scores[rows]).gather(1, classes[:, None])[:, 0],
            cls_losses=cls_losses[rows],
            box_losses=self._box_losses(own_deltas, boxes, gt_boxes),
        )

    @torch.no_grad()
    def _isr_weights(
        self,
        rows: Tensor,
        positives: Positives,
        predictions: tuple[Tensor, Tensor],
        samples: _Samples,
        proposals: list[Instances],
        cls_losses: Tensor,
    ) -> Tensor:
        """Weight (R,) of each sample's classification loss."""
        weights = torch.ones_like(cls_losses)
        if self.isr_p is not None:
            own = isr_p_weights(self.isr_p, positives, self.box2box_transform)
            weights = weights.index_copy(0, rows, own.to(weights.dtype))
        if self.isr_n is None:
            return weights
        negative = samples.classes == self.num_classes
        scores, top_classes = self._top_classes(predictions[0])
        ranked = negative & (scores > self.isr_n.score_thresh)
        if proposals and proposals[0].has(IMPORTANCE_FIELD):
            of_samples = cat([p.get(IMPORTANCE_FIELD) for p in proposals])
        else:
            boxes = self._regressed_boxes(predictions[1], samples.boxes, top_classes)
            sizes = [len(p) for p in proposals]
            ranks = rank_negatives(boxes, scores, ranked, sizes, self.isr_n.nms_thresh)
            of_samples = importance(ranks, largest_count(negative, sizes))
        isr_n = self.isr_n
        own = negative_weights(of_samples, negative, cls_losses, gamma=isr_n.gamma, beta=isr_n.beta)
        log_negatives(scores, negative, ranked, own, len(proposals))
        return torch.where(negative, own, weights)

    def _box_losses(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        return box_regression_losses(
            deltas,
            boxes,
            gt_boxes,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
            self.balanced_l1,
        )

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
        Predictions for T candidates, for samplers to go by.

        Args:
            predictions: logits (T, K + 1) and deltas (T, K * 4) or (T, 4).
            proposal_boxes, gt_boxes: floating (T, 4), the second of the matched objects, XYXY in
                pixels.
            gt_classes: int64 (T,), in [0, K], or -1 for candidates that are ignored.
            with_box_losses: if not, all of them are 0.
        """
        scores, deltas = predictions
        positive = is_positive(gt_classes, self.num_classes)
        labels = torch.where(gt_classes < 0, self.num_classes, gt_classes)
        cls_losses = self.classification_losses(scores, labels)
        top_scores, top_classes = self._top_classes(scores)
        boxes = self._regressed_boxes(
            deltas, proposal_boxes, torch.where(positive, gt_classes, top_classes)
        )
        box_losses = torch.zeros_like(cls_losses)
        if with_box_losses:
            rows = nonzero_tuple(positive)[0]
            own = self._deltas_of_classes(deltas[rows], gt_classes[rows])
            losses = self._box_losses(own, proposal_boxes[rows], gt_boxes[rows])
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


def predictor_settings(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of :meth:`PISAFastRCNNOutputLayers.set_losses` as ``cfg`` has them."""
    return {
        **pisa_settings(cfg),
        "focal_gamma": focal_gamma(cfg),
        "balanced_l1": balanced_l1_settings(cfg, "ROI_BOX_HEAD", "SMOOTH_L1_BETA"),
    }


def _gather_samples(proposals: list[Instances], like: Tensor) -> _Samples:
    if not proposals:
        no_boxes = torch.zeros(0, 4, device=like.device)
        return _Samples(like.new_zeros(0, dtype=torch.int64), no_boxes, no_boxes)
    classes = cat([p.gt_classes for p in proposals])
    boxes = cat([p.proposal_boxes.tensor for p in proposals])
    # The proposals of an image without objects are all negative: any box serves.
    gt_boxes = cat(
        [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    )
    return _Samples(classes, boxes, gt_boxes)


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
