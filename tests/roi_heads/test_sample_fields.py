import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import IMAGE_SIZE, random_boxes
from torch import tensor

from pisa_d2.roi_heads.sample_fields import OBJECT_FIELD, gather_fields, matched_objects

CPU = torch.device("cpu")


def samples(objects, classes, first_object=None):
    """Match the samples of an image to these of its four objects."""
    gt_boxes = random_boxes(4, torch.Generator().manual_seed(0))[torch.tensor(objects)]
    proposals = Instances(IMAGE_SIZE)
    proposals.proposal_boxes = Boxes(gt_boxes + torch.arange(len(objects))[:, None])
    proposals.gt_classes = tensor(classes)
    proposals.gt_boxes = Boxes(gt_boxes)
    if first_object is not None:
        proposals.set(OBJECT_FIELD, first_object + torch.tensor(objects))
    return proposals


def without_objects(num):
    proposals = Instances(IMAGE_SIZE)
    proposals.proposal_boxes = Boxes(random_boxes(num, torch.Generator().manual_seed(1)))
    proposals.gt_classes = torch.full((num,), 9)
    return proposals


def batch_of(first_objects):
    return [
        samples([2, 0, 2, 1], [5, 4, 5, 9], first_objects[0]),
        without_objects(2),
        samples([1, 1], [4, 4], first_objects[1]),
    ]


def test_fields_are_those_of_one_image_after_the_other():
    batch = batch_of((0, 4))
    classes, boxes, gt_boxes = gather_fields(batch, like=torch.zeros(8, 4))
    assert classes.tolist() == [5, 4, 5, 9, 9, 9, 4, 4]
    assert torch.equal(boxes, torch.cat([p.proposal_boxes.tensor for p in batch]))
    assert torch.equal(gt_boxes[:4], batch[0].gt_boxes.tensor)
    assert torch.equal(gt_boxes[6:], batch[2].gt_boxes.tensor)
    assert gt_boxes.shape == (8, 4)


def test_no_images_have_empty_fields_on_the_device_of_the_predictions():
    for device in ("cpu", "meta"):
        classes, boxes, gt_boxes = gather_fields([], like=torch.zeros(0, 4, device=device))
        assert classes.shape == (0,) and classes.dtype == torch.int64
        assert boxes.shape == gt_boxes.shape == (0, 4)
        assert {values.device.type for values in (classes, boxes, gt_boxes)} == {device}
    assert matched_objects([], CPU).shape == (0,)


def test_objects_are_those_of_the_field_and_minus_1_without_objects():
    objects = matched_objects(batch_of((10, 20)), CPU)
    assert objects.tolist() == [12, 10, 12, 11, -1, -1, 21, 21]


def test_without_the_identity_of_objects_they_are_told_apart_by_class_and_box():
    batch = batch_of((None, None))
    objects = matched_objects(batch, CPU).tolist()
    assert objects[4:6] == [-1, -1]
    assert objects[0] == objects[2] and objects[6] == objects[7]
    assert len({*objects[:4]}) == 3 and not {*objects[:4]} & {*objects[6:]}
    # Two objects with the same box differ by their class.
    first, second = matched_objects([samples([1, 1], [4, 5])], CPU).tolist()
    assert first != second


@pytest.mark.parametrize("with_field", [0, 1])
def test_objects_without_identity_differ_from_those_of_heads_that_give_one(with_field):
    first_objects = [None, None]
    first_objects[with_field] = 0 if with_field == 0 else 6
    objects = matched_objects(batch_of(first_objects), CPU).tolist()
    assert not {*objects[:4]} & {*objects[6:]}
