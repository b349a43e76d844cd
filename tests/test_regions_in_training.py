import pytest
import torch
from detectron2.structures import Boxes, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import HEADS, REGIONS_ON, random_batch, sampled_by, stock, switch, with_regions
from oracles import slow_inside
from region_scenes import SCENES, build, slow_classes

pytestmark = pytest.mark.usefixtures("storage")

OFF = ["MODEL.IGNORED_REGIONS.ENABLED", False]


SAMPLERS = {
    "random": sampled_by("RandomSampler", "RandomSampler"),
    "balanced": sampled_by("InstanceBalancedSampler", "IoUBalancedSampler"),
    "hard": sampled_by("HardSampler", "HardSampler"),
    "prime": sampled_by("IoUHLRSampler", "ScoreHLRSampler"),
    "joint": [
        *sampled_by("HardSampler", "HardSampler"),
        *("MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", True),
    ],
}


def negatives_inside(model, batch):
    """Count negatives in a training step, and the ones inside a region: box head and RPN."""
    heads, rpn = model.roi_heads, model.proposal_generator
    seen = {}
    label, label_anchors = heads.label_and_sample_proposals, rpn.label_and_sample_anchors

    def keep(key, value):
        seen[key] = value
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            heads,
            "label_and_sample_proposals",
            lambda *args: keep("samples", label(*args)),
        )
        patch.setattr(
            rpn,
            "label_and_sample_anchors",
            lambda anchors, *args: keep(
                "anchors", (Boxes.cat(anchors).tensor, label_anchors(anchors, *args))
            )[1],
        )
        losses = model(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    anchors, (labels, _) = seen["anchors"]
    counts = []
    for boxes_of, sample in zip(zip(seen["samples"], labels, strict=True), batch, strict=True):
        samples, own = boxes_of
        regions = sample["instances"].ignored_regions.tensor.tolist()
        negatives = [
            samples.proposal_boxes.tensor[samples.gt_classes == heads.num_classes],
            anchors[own == 0],
        ]
        counts += [(len(x), sum(slow_inside(x.tolist(), regions, 0.5))) for x in negatives]
    return counts


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_chooses_a_negative_inside_a_region(sampler):
    opts = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 2048]
    regions = [SCENES["overlapping"], SCENES["whole image"], []]
    batch = with_regions(random_batch([3, 2, 2]), *regions)
    counts = negatives_inside(build(*REGIONS_ON, *SAMPLERS[sampler], *opts), batch)
    assert all(inside == 0 for _, inside in counts)
    # In the image that is all region, only anchors that extend beyond it remain.
    assert [num > 0 for num, _ in counts] == [True, True, False, True, True, True]
    # Without the setting, negatives inside regions are chosen.
    counts = negatives_inside(build(*REGIONS_ON, *OFF, *SAMPLERS[sampler], *opts), batch)
    assert all(inside > 0 for _, inside in counts[:4])


@pytest.mark.parametrize("heads", HEADS)
def test_mixed_precision_ignores_regions_too(heads):
    batch = with_regions(random_batch([3, 0]), SCENES["overlapping"], SCENES["whole image"])
    with torch.autocast("cpu", torch.bfloat16):
        counts = negatives_inside(build(*HEADS[heads], *REGIONS_ON), batch)
    assert all(inside == 0 for _, inside in counts) and counts[0][0] > 0


@pytest.mark.parametrize("heads", HEADS)
def test_without_a_region_and_without_the_setting_a_model_is_stock_to_the_last_bit(heads):
    plain = random_batch([3, 0])
    crowded = with_regions(plain, SCENES["overlapping"], SCENES["whole image"])
    off = switch(False, False, False)
    theirs = losses_of(build(*stock(heads)), plain)
    for opts, batch in ((REGIONS_ON, with_regions(plain, [], [])), ([*REGIONS_ON, *OFF], crowded)):
        ours = losses_of(build(*HEADS[heads], *off, *opts), batch)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses_of(model, batch):
    torch.manual_seed(1)
    with EventStorage():
        return model(batch)


def test_regions_have_no_part_in_the_losses_of_positives():
    [sample] = random_batch([3])
    objects = sample["instances"]
    corners = objects.gt_boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
    objects.gt_masks = PolygonMasks([[polygon] for polygon in corners])
    centers = objects.gt_boxes.get_centers()
    points = torch.cat([centers, torch.full((3, 1), 2.0)], dim=1)
    objects.gt_keypoints = Keypoints(points[:, None].repeat(1, 2, 1))
    model = build(
        *REGIONS_ON,
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.KEYPOINT_ON", True),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)),
    )
    crowded = losses_of(model, with_regions([sample], SCENES["overlapping"]))
    plain = losses_of(model, with_regions([sample], []))
    same = {"loss_mask", "loss_keypoint", "loss_box_reg", "loss_carl", "loss_rpn_loc"}
    assert same <= crowded.keys() and all(plain[name] > 0 for name in same)
    for name in crowded:
        assert torch.equal(crowded[name], plain[name]) == (name in same), name


def test_the_scalars_count_what_is_ignored_inside_regions():
    model = build(*REGIONS_ON)
    regions = [SCENES["overlapping"], []]
    batch = with_regions(random_batch([3, 2]), *regions)
    with EventStorage(19) as storage:
        proposals = []
        match = model.roi_heads.match
        model.roi_heads.match = lambda *args: proposals.append(args[0]) or match(*args)
        model(batch)
    latest = storage.latest()
    inside = slow_classes(
        proposals[0][0].proposal_boxes.tensor.tolist(),
        batch[0]["instances"],
        regions[0],
        model.roi_heads.num_classes,
    ).count(-1)
    assert latest["pisa/ignored_proposals"][0] == inside / 2 > 0
    assert latest["pisa/ignored_anchors"][0] > 100
    with EventStorage(18) as storage:
        model(batch)
    assert "pisa/ignored_proposals" not in storage.latest()
