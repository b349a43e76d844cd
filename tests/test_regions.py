import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes, Instances
from helpers import (
    HEADS,
    IMAGE_SIZE,
    REGIONS_ON,
    random_batch,
    random_boxes,
    small_retinanet_cfg,
    with_regions,
)
from oracles import slow_inside, slow_iou
from region_scenes import SCENES, WHOLE, build, candidates, slow_classes

from pisa_d2.regions import TargetsWithRegions, ignore_inside, inside_regions

pytestmark = pytest.mark.usefixtures("storage")


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_box_is_inside_by_the_share_of_its_own_area(threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes, regions = random_boxes(50, generator), random_boxes(4, generator)
    boxes[:2, 2:] = boxes[:2, :2]  # without area
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
    found, _, objects = retinanet.label_anchors_and_objects([anchors], [target])
    assert torch.equal(found, expected)
    positive = (expected >= 0) & (expected < retinanet.num_classes)
    assert ((objects >= 0) & (objects < num_objects))[positive].all()
