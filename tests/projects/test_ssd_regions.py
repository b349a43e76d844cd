import copy
import logging

import pytest
import ssd
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import noise_image, with_regions
from oracles import slow_inside
from ssd_models import NUM_CLASSES, OFF, PISA, PLAIN, load, random_predictions, small

from pisa_d2.data import KeepRegions

pytestmark = pytest.mark.usefixtures("storage")

ON = ["MODEL.IGNORED_REGIONS.ENABLED", True]
BOXES = [[4, 6, 20, 30], [30, 5, 60, 40], [24, 20, 40, 47]]


def annotation(box, **flags):
    return {"bbox": box, "bbox_mode": 0, "category_id": 1, **flags}


@pytest.fixture
def record(tmp_path):
    noise_image(tmp_path / "0.jpg", 0)
    return {"file_name": str(tmp_path / "0.jpg"), "height": 48, "width": 64}


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_regions_go_where_objects_go_and_guide_no_crop(record, flip):
    mapper = ssd.SSDMapper(load(PLAIN, "INPUT.RANDOM_FLIP", flip))
    objects = [annotation(box) for box in BOXES]
    regions = [annotation(box, iscrowd=1) for box in BOXES]
    clipped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        theirs = mapper({**record, "annotations": copy.deepcopy(objects)})
        torch.manual_seed(seed)
        crowded = {**record, "annotations": copy.deepcopy([*regions, *objects])}
        ours = KeepRegions(mapper)(crowded)
        assert torch.equal(ours["image"], theirs["image"])
        ours, theirs = ours["instances"], theirs["instances"]
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
        assert torch.equal(ours.gt_classes, theirs.gt_classes)
        # Objects whose centre a crop leaves out are gone; the regions are not.
        found = {tuple(box) for box in ours.ignored_regions.tensor.tolist()}
        assert {tuple(box) for box in theirs.gt_boxes.tensor.tolist()} <= found
        assert (ours.ignored_regions.tensor >= 0).all()
        assert (ours.ignored_regions.area() > 0).all()
        assert (ours.ignored_regions.tensor <= 300).all()
        clipped += len(found) - len(theirs)
    assert clipped > 5


def test_without_regions_and_without_keeping_them_nothing_changes(record):
    mapper = ssd.SSDMapper(load(PLAIN))
    for seed in range(5):
        results = []
        for annotations in (BOXES, [*BOXES, "crowd"]):
            torch.manual_seed(seed)
            made = [
                annotation([1, 1, 50, 40], iscrowd=1) if box == "crowd" else annotation(box)
                for box in annotations
            ]
            results.append((mapper({**record, "annotations": made}), torch.rand(1)))
        (ours, our_next), (theirs, their_next) = results
        assert torch.equal(ours["image"], theirs["image"]) and our_next == their_next
        boxes = [x["instances"].gt_boxes.tensor for x in (ours, theirs)]
        assert torch.equal(*boxes)


def scene(num_objects, side=300):
    """Default boxes and targets of images of that side, one of them with regions."""
    from ssd_models import random_targets

    boxes, targets = random_targets(num_objects)
    batch = [{"instances": target} for target in targets]
    regions = [[[0, 0, 70, 60], [40, 20, 128, 80], [5, 5, 5, 90]], *[[]] * (len(batch) - 1)]
    return boxes, [x["instances"] for x in with_regions(batch, *regions)], regions


@pytest.mark.parametrize("num_objects", [[3, 2], [0, 3]])
def test_default_boxes_are_ignored_as_loops_over_boxes_and_regions_say(num_objects):
    boxes, targets, regions = scene(num_objects)
    plain = small(PLAIN).label_boxes(boxes, targets)[0]
    with EventStorage(19) as storage:
        classes, gt_boxes, objects = small(PLAIN, *ON).label_boxes(boxes, targets)
    expected = plain.clone()
    for row, own in zip(expected, regions, strict=True):
        inside = torch.tensor(slow_inside(boxes.tolist(), own, 0.5))
        row[inside & (row == NUM_CLASSES)] = -1
    assert torch.equal(classes, expected)
    num = int((classes == -1).sum())
    assert storage.latest()["pisa/ignored_anchors"][0] == num / 2 > 0


def test_regions_are_scaled_with_an_image_that_is_no_square():
    boxes, targets, _ = scene([2, 1])
    expected = small(PLAIN, *ON).label_boxes(boxes, targets)[0]
    for target in targets:
        target._image_size = (150, 600)
        for own in (target.gt_boxes, target.ignored_regions):
            own.scale(2, 0.5)
    assert torch.equal(small(PLAIN, *ON).label_boxes(boxes, targets)[0], expected)


@pytest.mark.parametrize("name", [PLAIN, PISA])
def test_what_is_ignored_has_no_loss_and_is_not_mined(name):
    boxes, targets, _ = scene([3, 0])
    model = small(name, *ON, *OFF)
    labels = model.label_boxes(boxes, targets)
    logits, deltas = random_predictions(2)
    with EventStorage():
        losses = model.losses(boxes, logits, deltas, *labels)
        ignored = labels[0] == -1
        [of_logits] = torch.autograd.grad(losses["loss_cls"], logits, retain_graph=True)
        assert ignored.any() and (of_logits[ignored] == 0).all()
        # As if these default boxes were not there.
        rest = ~ignored[0]
        again = model.losses(
            boxes[rest],
            logits[:1, rest],
            deltas[:1, rest],
            *(x[:1, rest] for x in labels),
        )
    for loss_name, loss in again.items():
        torch.testing.assert_close(losses[loss_name], loss)


def test_off_the_regions_change_nothing_and_a_stock_target_is_warned_of(caplog):
    boxes, targets, _ = scene([3, 2])
    model = small(PLAIN, *ON)
    plain = [target[:] for target in targets]
    stripped = [type(t).__mro__[1](t.image_size, **t.get_fields()) for t in plain]
    off = small(PLAIN)
    found, expected = off.label_boxes(boxes, targets), off.label_boxes(boxes, stripped)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with EventStorage(19), caplog.at_level(logging.WARNING):
        model.label_boxes(boxes, stripped)
    assert "drops the regions" in caplog.text
    assert isinstance(Boxes(boxes), Boxes)
