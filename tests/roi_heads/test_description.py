import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import StandardROIHeads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import nn

from pisa_d2 import PISAMixin
from pisa_d2.roi_heads.adoption import adopt
from pisa_d2.roi_heads.description import describe
from pisa_d2.samplers import HardSampler, OHEMSampler, PairSampler, RandomSampler
from pisa_d2.settings import CARL, ISR, NegativeISR

ALL = {"isr_p": ISR(), "isr_n": NegativeISR(), "carl": CARL()}
NONE = dict.fromkeys(ALL)
PAIR = PairSampler(positive=RandomSampler(), negative=HardSampler())


class Own(StandardROIHeads):
    def label_and_sample_proposals(self, proposals, targets):
        raise AssertionError("not reached")

    def _match_and_label_boxes(self, proposals, stage, targets):
        raise AssertionError("not reached")

    def forward(self, *args):
        raise AssertionError("not reached")


class PISAHeads(PISAMixin, StandardROIHeads):
    pass


class PISAOwnHeads(PISAMixin, Own):
    pass


class WithExtra(FastRCNNOutputLayers):
    def losses(self, predictions, proposals):
        return {**super().losses(predictions, proposals), "loss_extra": predictions[0].mean()}


def predictor(cls=FastRCNNOutputLayers, **parts):
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    made = cls(ShapeSpec(channels=4), box2box_transform=transform, num_classes=3)
    adopt(made, {**NONE, **parts})
    return made


def heads(box_predictor, cls=PISAHeads, sampler=PAIR, ignored_ioa_thresh=None):
    """Make heads with the attributes of a description alone."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    made.sampler, made.ignored_ioa_thresh = sampler, ignored_ioa_thresh
    nn.Module.__setattr__(made, "box_predictor", box_predictor)
    return made


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (ALL, "ISR-P, ISR-N, CARL"),
        ({"isr_n": NegativeISR()}, "ISR-N"),
        ({"isr_p": ISR(), "carl": CARL()}, "ISR-P, CARL"),
        ({}, "no part of PISA"),
    ],
)
def test_samplers_and_the_parts_that_are_on_are_named(parts, named):
    line = describe(heads(predictor(**parts)), PISAMixin)
    assert line == (f"PISAHeads: RandomSampler (positives) and HardSampler (negatives); {named}.")


def test_a_sampler_of_the_batch_and_ignored_regions_are_named():
    line = describe(heads(predictor(), sampler=OHEMSampler(), ignored_ioa_thresh=0.3), PISAMixin)
    assert line == (
        "PISAHeads: OHEMSampler; no part of PISA. Ignores regions, from 0.3 of a negative's area."
    )


def test_overrides_that_are_not_called_are_named_and_others_not():
    line = describe(heads(predictor(), PISAOwnHeads), PISAMixin)
    assert line.endswith(
        "; no part of PISA. Replaces Own.label_and_sample_proposals, Own._match_and_label_boxes."
    )


def test_a_predictor_of_another_class_has_no_part():
    assert "; no part of PISA in Linear." in describe(heads(nn.Linear(1, 1)), PISAMixin)


@pytest.mark.parametrize("parts", [ALL, NONE])
def test_losses_of_an_adopted_predictors_own_are_named_where_parts_are_on(parts):
    line = describe(heads(predictor(WithExtra, **parts)), PISAMixin)
    own = "ISR-P, ISR-N, CARL, where WithExtra uses them in its own losses"
    assert line.endswith(f"; {own if parts is ALL else 'no part of PISA'}.")


def test_stages_of_a_cascade_are_told_apart_if_they_differ():
    same = nn.ModuleList([predictor(**ALL) for _ in range(3)])
    assert describe(heads(same), PISAMixin).endswith("; ISR-P, ISR-N, CARL.")
    different = nn.ModuleList([predictor(), predictor(**ALL), nn.Linear(1, 1)])
    assert describe(heads(different), PISAMixin).endswith(
        "; stage 0: no part of PISA; stage 1: ISR-P, ISR-N, CARL; "
        "stage 2: no part of PISA in Linear."
    )
