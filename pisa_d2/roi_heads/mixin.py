"""The mixin that adds samplers and PISA to ROI heads."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROIHeads, StandardROIHeads
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..config import pisa_settings
from ..matcher import build_proposal_matcher, may_ignore
from ..regions import warn_of_gaps
from ..samplers import (
    BatchSampler,
    Candidates,
    Predictions,
    ProposalSampler,
    Quota,
)
from ..samplers.candidates import is_positive, needed_predictions
from ..scalars import log_ignored
from ..settings import CARL, ISR, NegativeISR
from .adoption import PISASettings, adopt, pick_sampler, predictors_of
from .description import describe
from .pooling import ReusingPooler
from .sampling import (
    label_boxes,
    label_samples,
    match_proposals,
    not_ignored,
    rows_of_images,
    with_object_ids,
    without_step_fields,
)
from .scoring import BoxBranch, branch_of, predict_candidates
from .step import PooledFeatures, Step

logger = logging.getLogger(__name__)

_EXTENDED = (StandardROIHeads, Res5ROIHeads, CascadeROIHeads)
_NOT_GIVEN: Any = object()


class PISAMixin(ROIHeads):
    """
    Mix this in to the left of ROI heads to add the samplers of this package and Prime Sample
    Attention::

        @ROI_HEADS_REGISTRY.register()
        class MyPISAROIHeads(PISAMixin, MyROIHeads):
            pass

    The heads extend :class:`StandardROIHeads`, :class:`Res5ROIHeads` or :class:`CascadeROIHeads`.
    Each of their ``FastRCNNOutputLayers``, even if it is assigned later, becomes a
    :class:`PISAFastRCNNOutputLayers` in place. A predictor of this class keeps its own settings;
    a predictor of an unrelated class is left as it is, with a warning.

    In a cascade the samplers choose among the proposals of the first stage. Later stages train on
    all boxes of the stage before, as in Detectron2, and have ISR and CARL too.

    Attributes:
        sampler: the :class:`pisa_d2.samplers.BatchSampler` that chooses the samples.
        ignored_ioa_thresh: see :meth:`__init__`.
    """

    ignores_regions = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(PISAMixin)]
        if any(base in before for base in _EXTENDED):
            raise TypeError(
                f"{cls.__name__}: PISAMixin must come before the ROI heads in the list of bases: "
                "class MyPISAROIHeads(PISAMixin, MyROIHeads)."
            )
        # TorchScript compiles the mask and keypoint branches unless these are constants. It reads
        # only the annotations of the class itself; Detectron2 adds them to StandardROIHeads.
        constants: dict[str, Any] = {"mask_on": Final[bool], "keypoint_on": Final[bool]}
        for base in reversed(cls.__mro__):
            if issubclass(base, ROIHeads):
                constants.update(inspect.get_annotations(base))
        cls.__annotations__ = constants

    def __init__(
        self,
        *args: Any,
        sampler: BatchSampler | None = None,
        positive_sampler: ProposalSampler | None = None,
        negative_sampler: ProposalSampler | None = None,
        isr_p: ISR | None = _NOT_GIVEN,
        isr_n: NegativeISR | None = _NOT_GIVEN,
        carl: CARL | None = _NOT_GIVEN,
        cascade_stages: Sequence[int] | None = _NOT_GIVEN,
        ignored_ioa_thresh: float | None = _NOT_GIVEN,
        pisa: PISASettings | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: arguments of the ROI heads: ``cfg`` and ``input_shape``, or their parts.
            sampler: chooses the samples of the batch, instead of the next two.
            positive_sampler, negative_sampler: choose among the positives and the negatives of each
                image. By default random, or as in ``cfg``.
            isr_p, isr_n, carl: the parts of PISA for stock predictors, None to switch a part off.
                By default the published settings, or as in ``cfg``.
            cascade_stages: stages of a cascade, counted from 0, with these parts; None for all.
            ignored_ioa_thresh: negatives with at least this share of their area inside a region to
                ignore are ignored, in (0, 1]; None to ignore no regions. By default None, or as in
                ``cfg``.
            pisa: defaults of the arguments above, as :meth:`from_config` passes them on.

        Raises:
            TypeError: the heads extend none of Detectron2's three classes, or have rotated boxes;
                or a sampler needs predictions that the box predictor cannot make.
            ValueError: ``sampler`` is given together with a sampler for one kind; a sampler does
                not choose the kind that it is given for; parts of PISA are given but a predictor
                has its own; a stage does not exist; or ``ignored_ioa_thresh`` is out of range.
        """
        name = type(self).__name__
        if not isinstance(self, _EXTENDED) or isinstance(self, RROIHeads):
            raise TypeError(
                f"{name} must extend {', '.join(base.__name__ for base in _EXTENDED[:-1])} or "
                f"{_EXTENDED[-1].__name__}, without rotated boxes, to be mixed with PISAMixin."
            )
        super().__init__(*args, **kwargs)
        cfg = args[0] if args else kwargs.get("cfg")
        if pisa is None:
            pisa = PISASettings() if cfg is None else PISASettings.from_config(cfg)
        parts: dict[str, Any] = {"isr_p": isr_p, "isr_n": isr_n, "carl": carl}
        given = {key: value for key, value in parts.items() if value is not _NOT_GIVEN}
        if cascade_stages is not _NOT_GIVEN:
            given["cascade_stages"] = tuple(cascade_stages or ())
        self.sampler = pick_sampler(sampler, positive_sampler, negative_sampler, pisa.sampler)
        self._given_parts = sorted(given)
        if ignored_ioa_thresh is not _NOT_GIVEN:
            given["ignored_ioa_thresh"] = ignored_ioa_thresh
        self._pisa: PISASettings | None = replace(pisa, **given)
        self.ignored_ioa_thresh = self._pisa.ignored_ioa_thresh
        self._step: Step | None = None
        self._told = False
        self._adopt_predictors()
        if self.sampler.needs_predictions:
            ReusingPooler.adopt(self.box_branch.pooler)

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any, **kwargs: Any) -> dict[str, Any]:
        pisa_settings(cfg)  # an error that explains the fix if the keys are missing
        ret = super().from_config(cfg, *args, **kwargs)
        # Heads that choose a matcher of their own keep it.
        if type(ret.get("proposal_matcher")) is Matcher:
            ret["proposal_matcher"] = build_proposal_matcher(cfg)
        if all(type(matcher) is Matcher for matcher in ret.get("proposal_matchers", [None])):
            ious = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS
            ret["proposal_matchers"] = [build_proposal_matcher(cfg, iou) for iou in ious]
        if cls._is_given_parts():
            ret["pisa"] = PISASettings.from_config(cfg)
        warn_of_gaps(cfg)
        return ret

    @classmethod
    def _is_given_parts(cls) -> bool:
        """
        Return whether a class before the mixin is ``@configurable``. If so, that class takes the
        config, and the mixin gets the parts that :meth:`from_config` made. Otherwise the mixin
        gets the config and passes it on, since some heads (DensePose's) take nothing else.
        """
        before = cls.__mro__[: cls.__mro__.index(PISAMixin)]
        return any(hasattr(vars(c).get("__init__"), "__wrapped__") for c in before)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Heads may replace the predictor after the constructor of their base class.
        if name == "box_predictor" and self.__dict__.get("_pisa") is not None:
            self._adopt_predictors()

    def _adopt_predictors(self) -> None:
        assert self._pisa is not None
        predictors = predictors_of(self.box_predictor)
        if isinstance(self, CascadeROIHeads):
            self._pisa.check_stages(len(predictors))
        warnings: list[str] = []
        for stage, predictor in enumerate(predictors):
            name = type(predictor).__name__  # before it is adopted
            missing = adopt(predictor, self._pisa.of_stage(stage), self._given_parts)
            if missing and self.sampler.needs_predictions:
                raise TypeError(
                    f"{self.sampler} needs the losses of a box predictor derived from "
                    f"PISAFastRCNNOutputLayers, which {name} is not: {missing}."
                )
            if missing and self._pisa.has_parts():
                warnings.append(
                    f"{type(self).__name__} keeps its box predictor {name}: {missing}. Derive it "
                    "from PISAFastRCNNOutputLayers, or switch the parts of PISA off."
                )
        for warning in dict.fromkeys(warnings):  # of all stages of a cascade, once
            logger.warning(warning)

    # Not in forward, which may have further arguments in some heads and must stay exportable.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        targets = args[3] if len(args) > 3 else kwargs.get("targets")
        if not self.training and targets is None:
            return super().__call__(*args, **kwargs)
        if not self._told:
            self._told = True
            logger.info(describe(self, replaced_by=PISAMixin))
        with self._in_step(args[1] if len(args) > 1 else kwargs["features"]):
            return super().__call__(*args, **kwargs)

    def choose_samples(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        Choose the samples of a training step without training on them.

        Args:
            features: the feature maps by name.
            proposals: the proposals of each image.
            targets: the objects of each image.

        Returns:
            As :meth:`label_and_sample_proposals`.
        """
        with self._in_step(features):
            return self.label_and_sample_proposals(proposals, targets)

    @contextmanager
    def _in_step(self, features: dict[str, Tensor]) -> Iterator[None]:
        # Samplers may need the features, which label_and_sample_proposals does not get.
        pooler = self.box_branch.pooler
        self._step = Step(features)
        if isinstance(pooler, ReusingPooler):
            pooler.step = self._step
        try:
            yield
        finally:
            self._step = None
            if isinstance(pooler, ReusingPooler):
                pooler.step = None

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances], *args: Any, **kwargs: Any
    ) -> list[Instances]:
        """
        Label and sample proposals as :class:`ROIHeads` does, but by the configured sampler.

        Args:
            proposals: the proposals of each image.
            targets: the objects of each image.
            args, kwargs: further arguments of heads that extend the signature; ignored, since
                their override is not called.

        Returns:
            The samples of each image, with Detectron2's fields and, in ``OBJECT_FIELD``, the
            number of the matched object in the batch.

        Raises:
            RuntimeError: the sampler needs predictions, but neither the heads nor
                :meth:`choose_samples` made this call.
        """
        targets = with_object_ids(targets)
        proposals = without_step_fields(proposals)
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        batch = self.match(proposals, targets)
        if self.ignored_ioa_thresh is not None:
            classes, boxes = zip(*((c.classes, c.boxes) for c in batch), strict=True)
            log_ignored("proposals", classes, boxes, targets, self.ignored_ioa_thresh)
        pooled = None
        if self.sampler.needs_predictions:
            batch, pooled = self._with_predictions(batch, proposals, targets)
        quota = Quota(self.batch_size_per_image, self.positive_fraction, self.num_classes)
        choices = self.sampler(batch, quota)
        indices = [choice.indices for choice in choices]
        sampled = [
            label_samples(*of_image)
            for of_image in zip(proposals, batch, targets, choices, indices, strict=True)
        ]
        if pooled is not None and self._step is not None:
            # The features of all candidates are pooled: the box head need not pool them again.
            rows = rows_of_images(indices, [len(p) for p in proposals])
            kept = pooled.index_select(0, rows)
            self._step.pooled = PooledFeatures([p.proposal_boxes for p in sampled], kept)

        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", np.mean([len(c.positives) for c in choices]))
        storage.put_scalar("roi_head/num_bg_samples", np.mean([len(c.negatives) for c in choices]))
        return sampled

    def match(self, proposals: list[Instances], targets: list[Instances]) -> list[Candidates]:
        """Match all proposals of each image to its objects."""
        return [
            self._match(self.proposal_matcher, p.proposal_boxes, target)
            for p, target in zip(proposals, targets, strict=True)
        ]

    def _match(self, matcher: Matcher, boxes: Boxes, target: Instances) -> Candidates:
        return match_proposals(matcher, boxes, target, self.num_classes, self.ignored_ioa_thresh)

    def predict(
        self,
        features: dict[str, Tensor],
        batch: list[Candidates],
        targets: list[Instances],
        needs: Sequence[str] = Predictions.FIELDS,
        observe: Callable[[tuple[Tensor, Tensor]], object] | None = None,
    ) -> tuple[list[Candidates], Tensor | None]:
        """
        Predict with the box head, or with the first stage of a cascade, for all candidates, without
        gradient.

        Args:
            features: the feature maps by name.
            batch: the candidates of each image, as :meth:`match` returns them.
            targets: the objects of each image.
            needs: names of the predictions to make.
            observe: called with logits (N, K + 1) and deltas (N, 4 or K * 4), part by part.

        Returns:
            The candidates with predictions, and the pooled features of all candidates, or None if
            they are too large to keep.
        """
        return predict_candidates(self.box_branch, features, batch, targets, needs, observe)

    def _with_predictions(
        self, batch: list[Candidates], proposals: list[Instances], targets: list[Instances]
    ) -> tuple[list[Candidates], Tensor | None]:
        if self._step is None:
            raise RuntimeError(
                f"{self.sampler} needs features: call the ROI heads or their "
                "choose_samples, instead of label_and_sample_proposals or forward."
            )
        needs = needed_predictions(self.sampler.needs_predictions)
        return self.predict(self._step.features, batch, targets, needs)

    @property
    @torch.jit.unused
    def box_branch(self) -> BoxBranch:
        """The modules from features to predictions for boxes; the first stage's in a cascade."""
        return branch_of(self)

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """
        Match and label the boxes of a later stage as :class:`CascadeROIHeads` does, and drop the
        ignored ones. Each proposal also carries the number of its object in ``OBJECT_FIELD``.
        """
        matcher = cast(Any, self).proposal_matchers[stage]
        ignores = self.ignored_ioa_thresh is not None or may_ignore(matcher)
        counts = []
        for p, target in zip(proposals, with_object_ids(targets), strict=True):
            candidates = self._match(matcher, p.proposal_boxes, target)
            label_boxes(p, candidates, target)
            counts.append(is_positive(candidates.classes, self.num_classes).sum())
            if ignores:
                counts.append((candidates.classes >= 0).sum())
        numbers = torch.stack(counts).tolist()  # the only copy to the host
        if ignores:
            numbers, kept = numbers[::2], numbers[1::2]
            proposals = [not_ignored(p, num) for p, num in zip(proposals, kept, strict=True)]
        mean, num = np.mean(numbers), np.mean([len(p) for p in proposals])
        storage = get_event_storage()
        storage.put_scalar(f"stage{stage}/roi_head/num_fg_samples", mean)
        storage.put_scalar(f"stage{stage}/roi_head/num_bg_samples", num - mean)
        return proposals
