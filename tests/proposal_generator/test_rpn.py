import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import random_batch, random_boxes, small_cfg, stock

from pisa_d2 import PISARPN, PROPOSAL_SAMPLER_REGISTRY, ProposalSampler
from pisa_d2.samplers import HardSampler, PairSampler, RandomSampler

pytestmark = pytest.mark.usefixtures("storage")

OURS = ["MODEL.PROPOSAL_GENERATOR.NAME", "PISARPN"]
POSITIVE, NEGATIVE = "MODEL.RPN.POSITIVE_SAMPLER.NAME", "MODEL.RPN.NEGATIVE_SAMPLER.NAME"


def build(*opts):
    torch.manual_seed(0)
    cfg = small_cfg(*opts)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    shapes = {f"p{i}": ShapeSpec(channels=channels, stride=2**i) for i in range(2, 7)}
    return build_proposal_generator(cfg, shapes).train()


def anchors_and_targets(num_objects, num_anchors=3000):
    """Make anchors on two levels, some of them near objects."""
    targets = [sample["instances"] for sample in random_batch(num_objects)]
    generator = torch.Generator().manual_seed(5)
    objects = torch.cat([target.gt_boxes.tensor for target in targets]).repeat(10, 1)
    near = objects + torch.rand(objects.shape, generator=generator) - 0.5
    return [Boxes(near), Boxes(random_boxes(num_anchors, generator))], targets


@pytest.mark.parametrize("num_objects", [[3, 5], [4, 0], [0, 0]])
@pytest.mark.parametrize("boundary", [-1, 0])
def test_at_random_it_is_stock_draw_for_draw(num_objects, boundary):
    opts = ["MODEL.RPN.BOUNDARY_THRESH", boundary, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 64]
    anchors, targets = anchors_and_targets(num_objects)
    results = []
    for name in ("PISARPN", "RPN"):
        rpn = build(*opts, "MODEL.PROPOSAL_GENERATOR.NAME", name)
        torch.manual_seed(1)
        labels, boxes = rpn.label_and_sample_anchors(anchors, targets)
        results.append(([*labels, *boxes, torch.rand(1)], rpn.state_dict()))
    (ours, our_state), (theirs, their_state) = results
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert our_state.keys() == their_state.keys()
    assert sum((x == 1).sum() for x in ours[:2]) > 0 or sum(num_objects) == 0


@pytest.mark.parametrize("num_objects", [[3, 5], [4, 0]])
def test_in_a_model_with_stock_heads_the_losses_are_stock_to_the_last_bit(num_objects):
    batch = random_batch(num_objects)
    losses, scalars = [], []
    for opts in (OURS, []):
        torch.manual_seed(0)
        model = build_model(small_cfg(*stock("PISAROIHeads"), *opts)).train()
        torch.manual_seed(1)
        with EventStorage() as storage:
            losses.append(model(batch))
        scalars.append(storage.latest())
    ours, theirs = losses
    assert ours.keys() == theirs.keys() and scalars[0] == scalars[1]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_negatives_are_limited_by_the_positives_of_their_image(limit):
    opts = ["MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE", limit, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 60]
    anchors, targets = anchors_and_targets([2, 0])
    for labels in build(*OURS, *opts).label_and_sample_anchors(anchors, targets)[0]:
        num_positives = int((labels == 1).sum())
        expected = min(60 - num_positives, int(limit * max(num_positives, 1)))
        assert (labels == 0).sum() == expected


def test_balanced_samplers_choose_among_anchors():
    opts = [POSITIVE, "InstanceBalancedSampler", NEGATIVE, "IoUBalancedSampler"]
    opts += ["MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS", 2]
    opts += ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 48, "MODEL.RPN.POSITIVE_FRACTION", 0.25]
    rpn = build(*OURS, *opts)
    anchors, [target] = anchors_and_targets([4])
    [labels], [boxes] = rpn.label_and_sample_anchors(anchors, [target])
    ious = rpn._match(Boxes.cat(anchors), target).ious
    negatives = ious[labels == 0]
    # RPN's negatives reach to an IoU of 0.3: the bins are cut at 0.15.
    assert len(negatives) == 36 and (negatives < 0.15).sum() == (negatives >= 0.15).sum() == 18
    chosen = boxes[labels == 1].unique(dim=0, return_counts=True)[1]
    assert chosen.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("kind", ["POSITIVE_SAMPLER", "NEGATIVE_SAMPLER"])
@pytest.mark.parametrize("name", ["HardSampler", "IoUHLRSampler", "ScoreHLRSampler"])
def test_a_sampler_that_needs_the_box_head_is_refused_with_the_reason(kind, name):
    with pytest.raises(ValueError) as error:
        build(*OURS, f"MODEL.RPN.{kind}.NAME", name)
    text = str(error.value)
    assert f"MODEL.RPN.{kind}.NAME = '{name}' is not allowed" in text
    assert "the box head's predictions, which come after the RPN" in text
    assert "'IoUBalancedSampler'" in text and "HardSampler'" not in text.split("allowed")[1]
    sampler = PairSampler(positive=RandomSampler(), negative=HardSampler())
    with pytest.raises(ValueError, match="HardSampler .negatives.' is not allowed"):
        PISARPN(**{**arguments(), "sampler": sampler})


def arguments():
    cfg = small_cfg(*OURS)
    shapes = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 7)}
    return PISARPN.from_config(cfg, shapes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (POSITIVE, "NoSampler"),
        (POSITIVE, "IoUBalancedSampler"),
        ("MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE", 0),
        ("MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE", -2),
        ("MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS", 0),
        # Below the 0.5 of ROI_HEADS, but not below the 0.3 of the RPN.
        ("MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_THRESH", 0.4),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(key, value):
    with pytest.raises(ValueError, match=key):
        build(*OURS, NEGATIVE, "IoUBalancedSampler", key, value)


def test_a_sampler_of_ones_own_sees_the_anchors():
    @PROPOSAL_SAMPLER_REGISTRY.register()
    class LargestAnchors(ProposalSampler):
        def __call__(self, candidates, num):
            sizes = candidates.boxes[:, 2:] - candidates.boxes[:, :2]
            return sizes.prod(dim=1).argsort(descending=True)[:num]

    rpn = build(*OURS, NEGATIVE, "LargestAnchors")
    anchors, [target] = anchors_and_targets([0])
    [labels], _ = rpn.label_and_sample_anchors(anchors, [target])
    areas = Boxes.cat(anchors).area()
    assert areas[labels == 0].min() >= areas[labels == -1].max()
