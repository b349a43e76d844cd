"""The mixin in heads of every shape that other projects have."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROIHeads, StandardROIHeads
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, RROIHeads
from detectron2.structures import Boxes, Instances
from helpers import HEADS, random_batch, sampled_by, small_cfg, switch

from pisa_d2 import PISACascadeROIHeads, PISAMixin, PISAROIHeads
from pisa_d2.matcher import IoUMatcher, ProposalMatcher
from pisa_d2.roi_heads.sample_fields import IMPORTANCE_FIELD, OBJECT_FIELD
from pisa_d2.samplers import HardSampler, IoUBalancedSampler, OHEMSampler, RandomSampler

pytestmark = pytest.mark.usefixtures("storage")

SHAPES = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 6)}


def make(cls, *opts, **kwargs):
    torch.manual_seed(0)
    return cls(small_cfg(*opts), SHAPES, **kwargs).train()


def inputs(num_objects=(3, 0, 4)):
    targets = [sample["instances"] for sample in random_batch(list(num_objects))]
    generator = torch.Generator().manual_seed(1)
    proposals = []
    for target in targets:
        corners = torch.randint(60, (20, 2), generator=generator).float()
        boxes = torch.cat(
            [target.gt_boxes.tensor.repeat(8, 1), torch.cat([corners, corners + 25], 1)]
        )
        boxes = boxes + 6 * torch.rand(boxes.shape, generator=generator)
        logits = torch.zeros(len(boxes))
        size = target.image_size
        proposals.append(Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits))
    features = {
        name: torch.randn(len(targets), 32, 96 // s.stride, 128 // s.stride, generator=generator)
        for name, s in SHAPES.items()
    }
    return features, proposals, targets


def test_the_mixin_on_the_right_is_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match="WrongWay: PISAMixin must come before the ROI heads"):

        class WrongWay(StandardROIHeads, PISAMixin):
            pass


def test_heads_that_extend_none_of_the_three_are_refused():
    class Plain(PISAMixin, ROIHeads):
        pass

    match = "Plain must extend StandardROIHeads, Res5ROIHeads or CascadeROIHeads"
    with pytest.raises(TypeError, match=match):
        make(Plain)


def test_heads_of_rotated_boxes_are_refused():
    class Rotated(PISAMixin, RROIHeads):
        pass

    with pytest.raises(TypeError, match="without rotated boxes"):
        make(Rotated)


class WithBranch(StandardROIHeads):
    """Further arguments, as in heads for semi-supervised training."""

    def forward(self, images, features, proposals, targets=None, compute_loss=True, branch=""):
        proposals = self.label_and_sample_proposals(proposals, targets, branch=branch)
        return branch, self._forward_box(features, proposals)

    def label_and_sample_proposals(self, proposals, targets, branch=""):
        raise AssertionError("the mixin takes its place")


@pytest.mark.parametrize("samplers", [[], sampled_by("HardSampler", "ScoreHLRSampler")])
def test_heads_with_further_arguments_train_with_pisa(samplers):
    class PISAWithBranch(PISAMixin, WithBranch):
        pass

    features, proposals, targets = inputs()
    heads = make(PISAWithBranch, *samplers)
    branch, losses = heads(None, features, proposals, targets, branch="teacher")
    assert branch == "teacher" and "loss_carl" in losses
    _, losses = heads(None, features=features, proposals=proposals, targets=targets)
    assert losses["loss_carl"] > 0


def parts_of(**changes):
    return {**PISAROIHeads.from_config(small_cfg(), SHAPES), **changes}


def test_heads_are_built_from_parts_alone_with_a_matcher_of_detectron2():
    heads = PISAROIHeads(**parts_of(proposal_matcher=Matcher([0.5], [0, 1]))).train()
    assert type(heads.sampler.positive) is type(heads.sampler.negative) is RandomSampler
    of_config = make(PISAROIHeads)
    heads.load_state_dict(of_config.state_dict())
    found = []
    for each in (heads, of_config):
        torch.manual_seed(3)
        found.append(each(None, *inputs())[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_heads_take_samplers_as_arguments_in_place_of_those_of_the_config():
    heads = make(PISAROIHeads, negative_sampler=IoUBalancedSampler(num_bins=5))
    assert heads.sampler.negative.num_bins == 5
    assert type(heads.sampler.positive) is RandomSampler
    heads = make(PISAROIHeads, sampler=OHEMSampler())
    assert "loss_carl" in heads(None, *inputs())[1]
    with pytest.raises(
        ValueError, match="Give either sampler, or positive_sampler and negative_sampler"
    ):
        PISAROIHeads(**parts_of(sampler=OHEMSampler(), positive_sampler=HardSampler()))


def test_a_stage_that_a_cascade_does_not_have_is_refused():
    opts = HEADS["PISACascadeROIHeads"]
    with pytest.raises(ValueError, match=r"CASCADE_STAGES = \[3\].*stages are \[0, 1, 2\]"):
        make(PISACascadeROIHeads, *opts, "MODEL.PISA.CASCADE_STAGES", [3])


def test_a_matcher_of_the_heads_own_stays():
    class Own(Matcher):
        pass

    class OwnHeads(StandardROIHeads):
        @classmethod
        def from_config(cls, cfg, input_shape):
            ret = super().from_config(cfg, input_shape)
            return {**ret, "proposal_matcher": Own([0.4], [0, 1])}

    class PISAOwnHeads(PISAMixin, OwnHeads):
        pass

    assert type(make(PISAOwnHeads).proposal_matcher) is Own
    assert type(make(PISAROIHeads).proposal_matcher) is IoUMatcher


@pytest.mark.parametrize("negative", ["RandomSampler", "ScoreHLRSampler"])
def test_samples_of_one_pass_can_be_the_proposals_of_the_next(negative):
    features, proposals, targets = inputs()
    heads = make(PISAROIHeads, *sampled_by("RandomSampler", negative))
    sampled, _ = heads(None, features, proposals, targets)
    again, losses = heads(None, features, sampled, targets)
    assert all(loss.isfinite() for loss in losses.values())
    gt_boxes = torch.cat([t.gt_boxes.tensor for t in targets])
    for p, target in zip(again, targets, strict=True):
        assert p.has(IMPORTANCE_FIELD) == (negative == "ScoreHLRSampler")
        if len(target):
            assert torch.equal(p.gt_boxes.tensor, gt_boxes[p.get(OBJECT_FIELD)])


class Band(ProposalMatcher):
    """Ignore proposals up to 0.2 below the threshold of positives."""

    def __init__(self, threshold):
        super().__init__([threshold - 0.2, threshold], [0, -1, 1])


@pytest.mark.parametrize("pisa", [True, False])
@pytest.mark.parametrize("sampler", ["RandomSampler", "HardSampler"])
def test_ignored_boxes_leave_a_cascade_before_the_head_of_their_stage(pisa, sampler):
    opts = [*HEADS["PISACascadeROIHeads"], *switch(pisa, pisa, pisa), *sampled_by(sampler, sampler)]
    heads = make(PISACascadeROIHeads, *opts)
    heads.proposal_matcher = Band(0.5)
    heads.proposal_matchers = [Band(0.5), Band(0.6), Band(0.7)]
    seen = []
    for predictor in heads.box_predictor:
        losses = type(predictor).losses
        predictor.losses = lambda out, sampled, predictor=predictor, losses=losses: (
            seen.append((len(out[0]), sampled)) or losses(predictor, out, sampled)
        )
    _, losses = heads(None, *inputs())
    assert all(loss.isfinite() for loss in losses.values())
    counts = [num for num, _ in seen]
    assert counts[0] >= counts[1] >= counts[2] and counts[0] > counts[2]
    for num, sampled in seen:
        classes = torch.cat([p.gt_classes for p in sampled])
        assert num == len(classes) and (classes >= 0).all()


def test_what_a_step_has_is_dropped_also_after_an_error():
    heads = make(PISAROIHeads, *sampled_by("HardSampler", "RandomSampler"))
    features, proposals, targets = inputs()
    heads.box_predictor.losses = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        heads(None, features, proposals, targets)
    assert heads._step is None and heads.box_pooler.step is None


def test_the_attributes_of_the_pooler_stay_within_reach():
    assert make(PISAROIHeads, *sampled_by("HardSampler", "RandomSampler")).box_pooler.output_size


def test_stock_cascade_heads_have_the_same_losses_where_nothing_is_ignored():
    opts = [*HEADS["PISACascadeROIHeads"], *switch(False, False, False)]
    found = []
    for cls in (PISACascadeROIHeads, CascadeROIHeads):
        heads = make(cls, *opts)
        torch.manual_seed(3)
        found.append(heads(None, *inputs())[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
