"""
The box predictor with the losses of Prime Sample Attention.

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
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Instances
from torch import Tensor

from ..attention import Positives, Samples, carl_loss, isr_weights
from ..box_losses import BALANCED_L1
from ..config import balanced_l1_settings, focal_gamma, pisa_settings
from ..ranking import ImageLayout
from ..samplers.candidates import is_positive
from ..settings import CARL, ISR, BalancedL1, NegativeISR, check_positive, check_range
from .predicting import PredictingOutputLayers
from .sample_fields import IMPORTANCE_FIELD, SampleFields, gather_fields, matched_objects


class _Batch(NamedTuple):
    """The R samples of a batch with their predictions."""

    fields: SampleFields
    logits: Tensor  # (R, K + 1)
    deltas: Tensor  # (R, K * 4) or (R, 4)
    cls_losses: Tensor  # (R,)
    positives: Tensor  # int64 (P,), indices in [0, R)


class PISAFastRCNNOutputLayers(PredictingOutputLayers):
    """
    The stock box predictor with the losses of Prime Sample Attention
    (https://arxiv.org/abs/1904.04821), focal loss and balanced L1. Parameters and inference do not
    change. With all parts off, the losses equal the stock predictor's to the last bit.

    Attributes:
        adopted: True for a stock predictor that ROI heads turned into this class with their
            settings.
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
            isr_p: reweighting of positives by IoU-HLR, None for off.
            isr_n: reweighting of negatives by Score-HLR, None for off.
            carl: the classification-aware regression loss, None for off.
            focal_gamma: exponent of softmax focal loss, None for cross entropy.
            balanced_l1: settings of the ``box_reg_loss_type`` "balanced_l1", None for the
                published settings.
            loss_weight: factor of all losses, or of each loss by its name.
            kwargs: arguments of Detectron2's ``FastRCNNOutputLayers``.

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
        """Set the arguments that :meth:`__init__` adds to the stock predictor's."""
        if focal_gamma is not None:
            check_range("focal_gamma", focal_gamma, 0)
            if getattr(self, "use_sigmoid_ce", False):
                raise ValueError(
                    "MODEL.ROI_BOX_HEAD.FOCAL_LOSS needs the softmax: switch USE_SIGMOID_CE off."
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
        Compute the losses of a batch.

        Args:
            predictions: logits (R, K + 1) and deltas (R, K * 4) or (R, 4).
            proposals: the sampled proposals with ``proposal_boxes`` and ``gt_classes``, and in
                images with objects also ``gt_boxes`` and, from :class:`PISAMixin`, the field
                ``OBJECT_FIELD``, which ISR-P reads.

        Returns:
            ``loss_cls``, ``loss_box_reg`` and, if CARL is on, ``loss_carl``: scalars under the
            common normaliser R; 0, with a graph, if there is nothing to learn from.
        """
        if self._has_stock_losses():
            return super().losses(predictions, proposals)
        batch = self._gather(predictions, proposals)
        _log_classification_stats(predictions[0], batch.fields.classes)
        # ISR takes the objects from all samples, not from the positives.
        positives = self._positives(batch, objects=batch.positives)
        cls_losses = batch.cls_losses
        if self.isr_p is not None or self.isr_n is not None:
            cls_losses = self.isr_weights(self._samples(batch, proposals), positives) * cls_losses

        normalizer = max(len(cls_losses), 1.0)
        losses = {
            "loss_cls": cls_losses.sum() / normalizer,
            "loss_box_reg": positives.box_losses.sum() / normalizer,
        }
        if self.carl is not None:
            losses["loss_carl"] = self.carl_loss(self.carl, positives) / normalizer
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def isr_weights(self, samples: Samples, positives: Positives) -> Tensor:
        """Return the weights (R,) of the classification losses; for subclasses to override."""
        transform = self.box2box_transform
        return isr_weights(self.isr_p, self.isr_n, samples, positives, transform)

    def carl_loss(self, carl: CARL, positives: Positives) -> Tensor:
        """Return CARL of a batch, not normalised; for subclasses to override."""
        return carl_loss(carl, positives)

    def positives(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> Positives:
        """Return the positives as :meth:`losses` weights them, from the same arguments."""
        batch = self._gather(predictions, proposals)
        objects = matched_objects(proposals, batch.deltas.device)
        return self._positives(batch, objects[batch.positives])

    def _has_stock_losses(self) -> bool:
        own = PISAFastRCNNOutputLayers.classification_losses
        return (
            all(part is None for part in (self.isr_p, self.isr_n, self.carl, self.focal_gamma))
            and self.box_reg_loss_type != BALANCED_L1
            and type(self).classification_losses is own
        )

    def _gather(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> _Batch:
        scores, deltas = predictions
        fields = gather_fields(proposals, deltas)
        return _Batch(
            fields,
            scores,
            deltas,
            self.classification_losses(scores, fields.classes),
            # A copy to the host, which the stock losses make too.
            nonzero_tuple(is_positive(fields.classes, self.num_classes))[0],
        )

    def _positives(self, batch: _Batch, objects: Tensor) -> Positives:
        rows = batch.positives
        classes, boxes, gt_boxes = (values[rows] for values in batch.fields)
        deltas = self._deltas_of_classes(batch.deltas, rows, classes)
        probs = self._probs(batch.logits[rows]).gather(1, classes[:, None])[:, 0]
        return Positives(
            boxes=boxes,
            gt_boxes=gt_boxes,
            objects=objects,
            classes=classes,
            deltas=deltas,
            probs=probs,
            cls_losses=batch.cls_losses[rows],
            box_losses=self._box_losses(deltas, boxes, gt_boxes),
        )

    @torch.no_grad()
    def _samples(self, batch: _Batch, proposals: list[Instances]) -> Samples:
        classes, boxes, gt_boxes = batch.fields
        negative = classes == self.num_classes
        rows = torch.arange(len(classes), device=classes.device)
        scores = ranked = by_sampler = None
        if self.isr_n is None:
            own_or_top = classes.clamp(max=self.num_classes - 1)
        else:
            probs = self._probs(batch.logits)
            scores, top_classes = probs[:, : self.num_classes].max(dim=1)
            own_or_top = torch.where(negative, top_classes, classes)
            ranked = negative & (scores > self.isr_n.score_thresh)
            if proposals and proposals[0].has(IMPORTANCE_FIELD):
                by_sampler = cat([p.get(IMPORTANCE_FIELD) for p in proposals])
        return Samples(
            layout=ImageLayout([len(p) for p in proposals], classes.device),
            boxes=boxes,
            gt_boxes=gt_boxes,
            objects=rows if self.isr_p is None else matched_objects(proposals, classes.device),
            classes=classes,
            deltas=self._deltas_of_classes(batch.deltas, rows, own_or_top),
            scores=scores,
            cls_losses=batch.cls_losses,
            positives=batch.positives,
            negative=negative,
            ranked=ranked,
            negative_importance=by_sampler,
        )


def predictor_settings(cfg: CfgNode) -> dict[str, Any]:
    """Read the arguments of :meth:`PISAFastRCNNOutputLayers.set_losses` from ``cfg``."""
    return {
        **pisa_settings(cfg),
        "focal_gamma": focal_gamma(cfg),
        "balanced_l1": balanced_l1_settings(cfg, "ROI_BOX_HEAD", "SMOOTH_L1_BETA"),
    }
