"""Box predictors of other classes, however the heads got them."""

import copy
import logging
import pickle

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import StandardROIHeads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from helpers import HEADS, random_batch, sampled_by, small_cfg, switch
from torch import nn

from pisa_d2 import PISACascadeROIHeads, PISAFastRCNNOutputLayers, PISAMixin, PISAROIHeads
from pisa_d2.settings import CARL, ISR

pytestmark = pytest.mark.usefixtures("storage")

OFF = switch(False, False, False)
SHAPES = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 6)}
SETTINGS = {
    "loss_weight": {"loss_box_reg": 7.0},
    "test_topk_per_image": 5,
    "test_score_thresh": 0.9,
    "smooth_l1_beta": 0.3,
    "cls_agnostic_bbox_reg": True,
}


def make(cls, *opts):
    torch.manual_seed(0)
    return cls(small_cfg(*opts), SHAPES).train()


def predictor_of(heads, cls=FastRCNNOutputLayers, **kwargs):
    """Make a predictor of three classes for these heads."""
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    shape = heads.box_head.output_shape
    return cls(shape, box2box_transform=transform, num_classes=3, **kwargs)


def step(heads):
    batch = random_batch([3, 2])
    targets = [sample["instances"] for sample in batch]
    proposals = []
    for target in targets:
        boxes = target.gt_boxes.tensor.repeat(10, 1)
        boxes = boxes + 5 * torch.rand(boxes.shape, generator=torch.Generator().manual_seed(1))
        logits = torch.zeros(len(boxes))
        size = target.image_size
        proposals.append(Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits))
    features = {
        name: torch.randn(2, 32, 96 // s.stride, 128 // s.stride) for name, s in SHAPES.items()
    }
    return heads(None, features, proposals, targets)[1]


class OwnHeads(StandardROIHeads):
    """Heads that make a predictor with their own settings in from_config."""

    cls = FastRCNNOutputLayers

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        predictor = cls.cls(cfg, ret["box_head"].output_shape, **SETTINGS)
        return {**ret, "box_predictor": predictor}


def test_a_stock_predictor_keeps_its_parameters_and_its_settings():
    class PISAOwnHeads(PISAMixin, OwnHeads):
        pass

    heads, stock = make(PISAOwnHeads), make(OwnHeads)
    ours, theirs = heads.box_predictor, stock.box_predictor
    assert type(ours) is PISAFastRCNNOutputLayers
    for name in ("loss_weight", "test_topk_per_image", "test_score_thresh", "smooth_l1_beta"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.bbox_pred.weight.shape == theirs.bbox_pred.weight.shape == (4, 32)
    assert "loss_carl" in step(heads)


def before(base):
    class Heads(base):
        def __init__(self, cfg, input_shape):
            super().__init__(cfg, input_shape)
            self.box_predictor = predictor_of(self)

    return Heads


def test_a_predictor_made_in_the_constructor_of_the_extended_heads_is_adopted_in_place():
    class PISAHeads(PISAMixin, before(StandardROIHeads)):
        pass

    heads = make(PISAHeads)
    assert type(heads.box_predictor) is PISAFastRCNNOutputLayers
    assert "loss_carl" in step(heads)


def test_a_predictor_made_after_the_constructor_of_heads_with_pisa_is_adopted_in_place():
    heads = make(before(PISAROIHeads), "MODEL.PISA.ISR_P.GAMMA", 3.0)
    assert type(heads.box_predictor) is PISAFastRCNNOutputLayers
    assert heads.box_predictor.isr_p == ISR(gamma=3.0)
    predictor = predictor_of(heads)
    parameters = list(predictor.parameters())
    heads.box_predictor = predictor
    assert heads.box_predictor is predictor
    assert all(a is b for a, b in zip(predictor.parameters(), parameters, strict=True))
    assert "loss_carl" in step(heads)


def test_predictors_of_a_cascade_that_are_assigned_later_are_adopted_by_their_stage():
    opts = [*HEADS["PISACascadeROIHeads"], "MODEL.PISA.CASCADE_STAGES", [1]]
    heads = make(PISACascadeROIHeads, *opts)
    stock = make(CascadeROIHeads, *opts)
    heads.box_predictor = stock.box_predictor
    assert [p.isr_p is not None for p in heads.box_predictor] == [False, True, False]


def test_heads_give_their_parts_to_a_stock_predictor_and_none_to_one_with_its_own():
    parts = PISAROIHeads.from_config(small_cfg(), SHAPES)
    heads = PISAROIHeads(**parts, isr_p=None, carl=CARL(gamma=2.0))
    assert heads.box_predictor.isr_p is None and heads.box_predictor.carl.gamma == 2.0
    own = predictor_of(heads, PISAFastRCNNOutputLayers, isr_p=ISR(gamma=5.0))
    heads = PISAROIHeads(**{**parts, "box_predictor": own})
    assert heads.box_predictor is own and own.isr_p.gamma == 5.0
    with pytest.raises(ValueError, match="carl, isr_p given to ROI heads, but their box predictor"):
        PISAROIHeads(**{**parts, "box_predictor": own}, isr_p=ISR(), carl=None)


class Cosine(FastRCNNOutputLayers):
    """A different forward, as in few-shot detectors, with stock losses."""

    def forward(self, x):
        scores, deltas = super().forward(x)
        return 5 * scores.tanh(), deltas


class WithExtra(FastRCNNOutputLayers):
    """One loss in addition to the losses of the class that it extends."""

    def losses(self, predictions, proposals):
        losses = super().losses(predictions, proposals)
        return {**losses, "loss_extra": predictions[0].square().mean()}


class OwnProbs(FastRCNNOutputLayers):
    def predict_probs(self, predictions, proposals):
        return super().predict_probs(predictions, proposals)


class OwnLosses(FastRCNNOutputLayers):
    def losses(self, predictions, proposals):
        return {"loss_own": predictions[0].square().mean()}


class Unrelated(nn.Module):
    def __init__(self, cfg, input_shape, **kwargs):
        super().__init__()
        self.linear = nn.Linear(input_shape.channels, 4)


def with_predictor(predictor_cls):
    class PISAHeads(PISAMixin, OwnHeads):
        cls = predictor_cls

    return PISAHeads


def test_a_derived_predictor_has_the_losses_of_pisa_and_its_own_forward(caplog):
    heads = make(with_predictor(Cosine))
    assert isinstance(heads.box_predictor, Cosine)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "loss_carl" in step(heads)
    scores, _ = heads.box_predictor(torch.randn(5, *[heads.box_predictor.cls_score.in_features]))
    assert scores.abs().max() <= 5


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("cls", [FastRCNNOutputLayers, Cosine])
def test_adopted_predictors_can_be_copied_and_pickled(make_copy, cls):
    predictor = make(with_predictor(cls)).box_predictor
    other = make_copy(predictor)
    assert type(other) is type(predictor) and other.isr_p == predictor.isr_p
    assert torch.equal(other.cls_score.weight, predictor.cls_score.weight)
    assert other.cls_score.weight is not predictor.cls_score.weight


@pytest.mark.parametrize("cls", [WithExtra, OwnProbs, OwnLosses, Unrelated])
@pytest.mark.parametrize("pisa_on", [True, False])
def test_a_predictor_with_its_own_losses_is_named_in_one_warning_if_any_part_is_on(
    caplog, cls, pisa_on
):
    caplog.clear()
    make(with_predictor(cls), *([] if pisa_on else OFF))
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == pisa_on
    assert all(f"PISAHeads keeps its box predictor {cls.__name__}" in w for w in warnings)


def test_losses_that_extend_those_of_the_stock_predictor_extend_those_of_pisa():
    losses = step(make(with_predictor(WithExtra)))
    assert {"loss_extra", "loss_carl"} <= losses.keys()


@pytest.mark.parametrize("cls", [OwnProbs, OwnLosses, Unrelated])
def test_samplers_that_need_predictions_refuse_a_predictor_with_its_own_losses(cls):
    opts = sampled_by("RandomSampler", "HardSampler")
    with pytest.raises(TypeError, match=f"HardSampler .* which {cls.__name__} is not"):
        make(with_predictor(cls), *opts)


def test_one_line_says_what_is_active(caplog):
    class Own(StandardROIHeads):
        def label_and_sample_proposals(self, proposals, targets):
            raise AssertionError("not reached")

    class PISAHeads(PISAMixin, Own):
        pass

    heads = make(PISAHeads, "MODEL.PISA.ISR_N.ENABLED", False)
    with caplog.at_level(logging.INFO, "pisa_d2"):
        step(heads)
        step(heads)
    (line,) = [r.getMessage() for r in caplog.records if "PISAHeads:" in r.getMessage()]
    assert "RandomSampler (positives) and RandomSampler (negatives); ISR-P, CARL." in line
    assert "Replaces Own.label_and_sample_proposals" in line
