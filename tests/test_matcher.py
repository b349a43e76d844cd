import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from helpers import small_cfg
from torch import nn
from torch.testing import assert_close

from pisa_d2 import PROPOSAL_MATCHER_REGISTRY
from pisa_d2.matcher import (
    IoUMatcher,
    ProposalMatcher,
    build_proposal_matcher,
    match_boxes,
    may_ignore,
)

LEVELS = [([0.5], [0, 1]), ([0.3, 0.7], [0, -1, 1])]


def build(thresholds, labels):
    keys = ("MODEL.ROI_HEADS.IOU_THRESHOLDS", thresholds, "MODEL.ROI_HEADS.IOU_LABELS", labels)
    return build_proposal_matcher(small_cfg(*keys))


@pytest.mark.parametrize(("thresholds", "labels"), LEVELS)
@pytest.mark.parametrize("size", [(4, 50), (1, 3), (0, 5), (3, 0)])
def test_a_match_is_that_of_detectron2_with_the_iou(thresholds, labels, size):
    ious = torch.rand(size, generator=torch.Generator().manual_seed(0))
    matcher = build(thresholds, labels)
    stock = Matcher(thresholds, labels)(ious)
    for ours, theirs in zip(matcher(ious), stock, strict=True):
        assert torch.equal(ours, theirs)
    match = matcher.match(ious)
    assert torch.equal(match.objects, stock[0]) and torch.equal(match.labels, stock[1])
    highest = [max(column, default=0.0) for column in ious.T.tolist()]
    assert_close(match.ious, torch.tensor(highest))


@pytest.mark.parametrize(
    ("thresholds", "labels", "expected"),
    [
        ([0.5], [0, 1], (0.0, 0.5)),
        ([0.3, 0.7], [0, -1, 1], (0.0, 0.3)),
        ([0.1, 0.5], [-1, 0, 1], (0.1, 0.5)),
        ([0.5], [-1, 1], (0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("cls", [Matcher, ProposalMatcher])
def test_a_match_says_from_which_to_which_iou_negatives_reach(cls, thresholds, labels, expected):
    matcher = cls(thresholds, labels)
    boxes = Boxes(torch.tensor([[0.0, 0, 8, 8], [2.0, 0, 10, 8]]))
    match = match_boxes(matcher, boxes, Instances((9, 9), gt_boxes=boxes[:1]))
    assert match.negative_range == expected
    assert_close(match.ious, torch.tensor([1.0, 0.6]))


def test_a_matcher_may_go_by_the_boxes_and_the_fields_of_the_objects():
    class Inside(ProposalMatcher):
        """Ignore proposals in the left half of the image."""

        def match_boxes(self, boxes, targets):
            match = super().match_boxes(boxes, targets)
            left = boxes.tensor[:, 2] < targets.image_size[1] / 2
            return match._replace(labels=match.labels.masked_fill(left, -1))

    boxes = Boxes(torch.tensor([[0.0, 0, 8, 8], [12.0, 0, 20, 8]]))
    match = match_boxes(Inside([0.5], [0, 1]), boxes, Instances((20, 20), gt_boxes=boxes))
    assert match.labels.tolist() == [-1, 1]
    assert may_ignore(Inside([0.5], [0, 1])) and not may_ignore(Matcher([0.5], [0, 1]))
    assert may_ignore(ProposalMatcher([0.3, 0.5], [0, -1, 1]))


class Matching(nn.Module):
    def __init__(self, matcher):
        super().__init__()
        self.matcher = matcher

    def forward(self, ious: torch.Tensor):
        return self.matcher(ious)


def test_a_matcher_is_scripted_as_that_of_detectron2():
    ious = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    scripted = torch.jit.script(Matching(ProposalMatcher([0.3, 0.5], [0, -1, 1])))
    for ours, theirs in zip(scripted(ious), Matcher([0.3, 0.5], [0, -1, 1])(ious), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("thresholds", "labels", "key"),
    [
        ([0.5, 0.3], [0, -1, 1], "IOU_THRESHOLDS"),
        ([0.0], [0, 1], "IOU_THRESHOLDS"),
        ([float("nan")], [0, 1], "IOU_THRESHOLDS"),
        ([0.5], [0, -1, 1], "IOU_LABELS"),
        ([0.5], [0, 2], "IOU_LABELS"),
    ],
)
def test_thresholds_that_make_no_levels_are_refused_with_the_key(thresholds, labels, key):
    with pytest.raises(ValueError, match=rf"MODEL\.ROI_HEADS\.{key} = "):
        build(thresholds, labels)
    with pytest.raises(ValueError, match=f"^{key.removeprefix('IOU_').lower()} = "):
        IoUMatcher(thresholds=thresholds, labels=labels)


def test_an_unknown_matcher_is_refused_with_a_list_of_those_there_are():
    cfg = small_cfg("MODEL.ROI_HEADS.PROPOSAL_MATCHER", "Hungarian")
    with pytest.raises(ValueError, match="PROPOSAL_MATCHER = 'Hungarian'.*'IoUMatcher'"):
        build_proposal_matcher(cfg)
    assert PROPOSAL_MATCHER_REGISTRY.get("IoUMatcher") is IoUMatcher
