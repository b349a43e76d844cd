import pytest
import torch
from detectron2.modeling.matcher import Matcher
from helpers import small_cfg
from torch.testing import assert_close

from pisa_d2 import PROPOSAL_MATCHER_REGISTRY
from pisa_d2.matcher import IoUMatcher, build_proposal_matcher

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


def test_an_unknown_matcher_is_refused_with_a_list_of_those_there_are():
    cfg = small_cfg("MODEL.ROI_HEADS.PROPOSAL_MATCHER", "Hungarian")
    with pytest.raises(ValueError, match="PROPOSAL_MATCHER = 'Hungarian'.*'IoUMatcher'"):
        build_proposal_matcher(cfg)
    assert PROPOSAL_MATCHER_REGISTRY.get("IoUMatcher") is IoUMatcher
