import copy
import itertools
import logging
import pickle
import re

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import EventStorage
from helpers import (
    HEADS,
    IMAGE_SIZE,
    REGIONS_ON,
    ROOT,
    random_batch,
    random_boxes,
    sampled_by,
    small_cfg,
    small_retinanet_cfg,
    stock,
    switch,
    with_regions,
)
from oracles import slow_inside, slow_iou

from pisa_d2 import PROPOSAL_MATCHER_REGISTRY, PISAROIHeads
from pisa_d2.regions import TargetsWithRegions, ignore_inside, inside_regions, warn_of_gaps

pytestmark = pytest.mark.usefixtures("storage")

HEIGHT, WIDTH = IMAGE_SIZE
WHOLE = [0, 0, WIDTH, HEIGHT]
# Regions of an image with the objects of random_batch([3]).
SCENES = {
    "none": [],
    "whole image": [WHOLE],
    "no area": [[20, 10, 20, 90], [30, 30, 30, 30]],
    "overlapping": [[0, 0, 70, 60], [40, 20, 128, 80]],
    "over the objects": [box.tolist() for box in random_batch([3])[0]["instances"].gt_boxes.tensor],
}
OFF = ["MODEL.IGNORED_REGIONS.ENABLED", False]


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    """Let a warning that is given once be given in each test."""
    counter = type(detectron2_logger._LOG_COUNTER)()
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", counter)


def build(*opts, cfg=small_cfg):
    torch.manual_seed(0)
    return build_model(cfg(*opts)).train()


def candidates(targets, seed=0):
    """Boxes near the objects, anywhere, and one of no area in the middle."""
    generator = torch.Generator().manual_seed(seed)
    near = targets.gt_boxes.tensor.repeat(20, 1)
    near = near + 12 * torch.rand(near.shape, generator=generator) - 6
    middle = torch.tensor([[60.0, 40, 60, 40]])
    return torch.cat([near, random_boxes(60, generator), middle])


def slow_classes(boxes, targets, regions, num_classes, threshold=0.5):
    """One proposal after the other: by the object of highest IoU, and by the regions."""
    objects = targets.gt_boxes.tensor.tolist()
    classes = []
    for box, inside in zip(boxes, slow_inside(boxes, regions, 0.5), strict=True):
        ious = [slow_iou(box, own, np.float32) for own in objects]
        if ious and max(ious) >= threshold:
            classes.append(int(targets.gt_classes[ious.index(max(ious))]))
        else:
            classes.append(-1 if inside else num_classes)
    return classes


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_box_is_inside_by_the_share_of_its_own_area(threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes, regions = random_boxes(50, generator), random_boxes(4, generator)
    boxes[:2, 2:] = boxes[:2, :2]  # of no area
    boxes[2] = regions[0]
    regions[3, 2] = regions[3, 0]
    found = inside_regions(boxes, regions, threshold)
    assert found.tolist() == slow_inside(boxes.tolist(), regions.tolist(), threshold)
    assert found.any() and not found.all() and not found[:2].any() and found[2]


def test_of_a_box_half_inside_the_threshold_itself_is_inside():
    box, region = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[5.0, 0, 100, 100]])
    assert inside_regions(box, region, 0.5) and not inside_regions(box, region, 0.51)


def test_regions_stay_when_targets_are_moved_selected_copied_and_sent():
    [sample] = with_regions(random_batch([3]), [WHOLE, [1, 2, 3, 4]])
    targets = sample["instances"]
    for kept in (
        targets.to("cpu"),
        targets[:],
        targets[torch.tensor([2, 0])],
        targets[targets.gt_classes > 5],
        copy.deepcopy(targets),
        pickle.loads(pickle.dumps(targets)),
    ):
        assert isinstance(kept, TargetsWithRegions)
        assert kept.ignored_regions.tensor.tolist() == [WHOLE, [1, 2, 3, 4]]
        assert kept.image_size == IMAGE_SIZE and set(kept.get_fields()) == {
            "gt_boxes",
            "gt_classes",
        }
    assert len(targets[torch.tensor([2, 0])]) == 2
    assert targets.to("meta").ignored_regions.device.type == "meta"


def test_ignoring_makes_no_copy_to_the_host(as_on_gpu):
    [sample] = with_regions(random_batch([3]), SCENES["overlapping"])
    boxes = candidates(sample["instances"])
    labels = torch.ones(len(boxes), dtype=torch.int64)
    found = ignore_inside(as_on_gpu(labels), 1, as_on_gpu(boxes), sample["instances"], 0.5)
    assert 0 < (found.as_subclass(torch.Tensor) == -1).sum() < len(boxes)


@pytest.fixture(scope="module")
def models():
    built = {heads: build(*HEADS[heads], *REGIONS_ON) for heads in HEADS}
    return {**built, "PISARetinaNet": build(*REGIONS_ON[:2], cfg=small_retinanet_cfg)}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("num_objects", [3, 0])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_ignore_what_loops_over_proposals_and_regions_ignore(
    models, heads, num_objects, scene
):
    roi_heads = models[heads].roi_heads
    batch = with_regions(random_batch([num_objects, 3]), SCENES[scene], [])
    targets = [sample["instances"] for sample in batch]
    boxes = [candidates(target) for target in targets]
    proposals = [Instances(IMAGE_SIZE, proposal_boxes=Boxes(own)) for own in boxes]
    expected = [
        slow_classes(own.tolist(), target, regions, roi_heads.num_classes)
        for own, target, regions in zip(boxes, targets, [SCENES[scene], []], strict=True)
    ]
    found = [candidates.classes.tolist() for candidates in roi_heads.match(proposals, targets)]
    assert found == expected

    if heads == "PISACascadeROIHeads":
        expected = [
            slow_classes(own.tolist(), target, regions, roi_heads.num_classes, threshold=0.6)
            for own, target, regions in zip(boxes, targets, [SCENES[scene], []], strict=True)
        ]
        later = roi_heads._match_and_label_boxes(proposals, 1, targets)
        for p, own, classes in zip(later, boxes, expected, strict=True):
            kept = [i for i, class_ in enumerate(classes) if class_ >= 0]
            assert p.gt_classes.tolist() == [classes[i] for i in kept]
            assert torch.equal(p.proposal_boxes.tensor, own[kept])


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("num_objects", [3, 0])
def test_rpn_and_retinanet_ignore_what_loops_over_anchors_and_regions_ignore(
    models, num_objects, scene
):
    batch = random_batch([num_objects])
    [target] = [sample["instances"] for sample in with_regions(batch, SCENES[scene])]
    rpn = models["PISAROIHeads"].proposal_generator
    generator = torch.Generator().manual_seed(0)
    anchors = Boxes(torch.cat([candidates(target), random_boxes(2000, generator)]))
    inside = torch.tensor(slow_inside(anchors.tensor.tolist(), SCENES[scene], 0.5))

    _, labels = rpn.anchor_matcher(
        torch.tensor(
            [
                [slow_iou(anchor, own, np.float32) for anchor in anchors.tensor.tolist()]
                for own in target.gt_boxes.tensor.tolist()
            ],
            dtype=torch.float32,
        ).reshape(num_objects, len(anchors))
    )
    labels[inside & (labels == 0)] = -1
    classes = rpn._match(anchors, target).classes
    assert (classes == 0).tolist() == (labels == 1).tolist()
    assert (classes == 1).tolist() == (labels == 0).tolist()
    assert (classes == -1).tolist() == (labels == -1).tolist()

    retinanet = models["PISARetinaNet"]
    [expected], _ = RetinaNet.label_anchors(retinanet, [anchors], [batch[0]["instances"]])
    expected = torch.where(inside & (expected == retinanet.num_classes), -1, expected)
    [found], _ = retinanet.label_anchors([anchors], [target])
    assert torch.equal(found, expected)
    [found], _, [objects] = retinanet.label_anchors_and_objects([anchors], [target])
    assert torch.equal(found, expected)
    positive = (expected >= 0) & (expected < retinanet.num_classes)
    assert ((objects >= 0) & (objects < num_objects))[positive].all()


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
    """Of the box head and the RPN in a training step: negatives, and those inside a region."""
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
    # In the image that is all region, anchors that reach out of it are left.
    assert [num > 0 for num, _ in counts] == [True, True, False, True, True, True]
    # Without the setting they are chosen.
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


def test_targets_without_their_regions_get_one_warning_that_names_the_loader(caplog):
    model = build(*REGIONS_ON)
    for _ in range(2):
        model(random_batch([3, 2]))
    assert [r.levelno for r in caplog.records if "IGNORED_REGIONS" in r.message] == [
        logging.WARNING
    ]
    assert "the data loader drops the regions" in caplog.text
    assert "pisa_d2.data.KeepRegions(mapper)" in caplog.text


NAMES = {
    "MODEL.PROPOSAL_GENERATOR.NAME": ("PISARPN", "RPN"),
    "MODEL.ROI_HEADS.NAME": ("PISAROIHeads", "StandardROIHeads"),
}


@pytest.mark.parametrize("chosen", [*itertools.product([0, 1], repeat=2)])
def test_parts_that_do_not_ignore_regions_get_one_warning_that_names_them(caplog, chosen):
    names = {key: both[i] for (key, both), i in zip(NAMES.items(), chosen, strict=True)}
    opts = [x for pair in names.items() for x in pair]
    cfg = small_cfg(*REGIONS_ON, *opts)
    for _ in range(2):
        build_model(cfg)
    warn_of_gaps(cfg)
    warned = [r.message for r in caplog.records if "has no effect on" in r.message]
    assert len(warned) == (1 if any(chosen) else 0)
    for (key, (_, theirs)), i in zip(NAMES.items(), chosen, strict=True):
        assert (f"{key} = {theirs!r}" in caplog.text) == bool(i)


def test_a_stock_retinanet_is_warned_of_too(caplog):
    warn_of_gaps(small_retinanet_cfg(*REGIONS_ON[:2]))
    assert not caplog.records
    warn_of_gaps(small_retinanet_cfg(*REGIONS_ON[:2], "MODEL.META_ARCHITECTURE", "RetinaNet"))
    assert "no effect on MODEL.META_ARCHITECTURE = 'RetinaNet'" in caplog.text


@pytest.mark.parametrize("value", [0, 1.1, -0.5, "half", float("nan")])
def test_a_share_out_of_range_is_refused(value):
    key = "MODEL.IGNORED_REGIONS.IOA_THRESH"
    cfg = small_cfg(*REGIONS_ON)
    cfg.MODEL.IGNORED_REGIONS.IOA_THRESH = value
    with pytest.raises(ValueError, match=key):
        build_model(cfg)
    with pytest.raises(ValueError, match="ignored_ioa_thresh"):
        PISAROIHeads(small_cfg(), build().backbone.output_shape(), ignored_ioa_thresh=value)


def test_heads_take_the_share_as_an_argument():
    shapes = build().backbone.output_shape()
    assert PISAROIHeads(small_cfg(), shapes, ignored_ioa_thresh=0.3).ignored_ioa_thresh == 0.3
    assert PISAROIHeads(small_cfg(*REGIONS_ON), shapes).ignored_ioa_thresh == 0.5
    assert (
        PISAROIHeads(small_cfg(*REGIONS_ON), shapes, ignored_ioa_thresh=None).ignored_ioa_thresh
        is None
    )


def test_the_matcher_in_the_documentation_ignores_by_the_center_in_any_image():
    text = (ROOT / "docs/ignored_regions.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    cfg = small_cfg(*REGIONS_ON, "MODEL.IGNORED_REGIONS.IOA_THRESH", 1.0)
    program = {"cfg": cfg, "mapper": lambda record: None}
    try:
        for block in blocks:
            exec(block, program)
        heads = build_model(cfg).roi_heads
    finally:
        PROPOSAL_MATCHER_REGISTRY._obj_map.pop("CenterMatcher", None)
    region = [40, 20, 90, 80]
    for num_objects in (3, 0):
        [sample] = with_regions(random_batch([num_objects]), [region])
        targets = sample["instances"]
        boxes = candidates(targets)
        [found] = heads.match([Instances(IMAGE_SIZE, proposal_boxes=Boxes(boxes))], [targets])
        expected = slow_classes(boxes.tolist(), targets, [], heads.num_classes)
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            inside = 40 <= (x1 + x2) / 2 < 90 and 20 <= (y1 + y2) / 2 < 80
            if inside and expected[i] == heads.num_classes:
                expected[i] = -1
        assert found.classes.tolist() == expected and -1 in expected
