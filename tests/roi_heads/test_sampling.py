import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from helpers import IMAGE_SIZE, random_batch, with_regions
from torch import tensor

from pisa_d2.roi_heads.sample_fields import IMPORTANCE_FIELD, OBJECT_FIELD
from pisa_d2.roi_heads.sampling import (
    label_samples,
    match_proposals,
    rows_of_images,
    with_object_ids,
    without_step_fields,
)
from pisa_d2.samplers import Choice

MATCHER = Matcher([0.5], [0, 1], allow_low_quality_matches=False)
NUM_CLASSES = 3
BOXES = tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [40, 40, 60, 60], [70, 70, 80, 80]])


def target(boxes=((0, 0, 10, 10), (40, 40, 60, 60)), classes=(2, 0)) -> Instances:
    instances = Instances(IMAGE_SIZE)
    instances.gt_boxes = Boxes(tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = tensor(classes, dtype=torch.int64)
    return instances


def test_objects_are_numbered_throughout_the_batch_on_copies():
    targets = [sample["instances"] for sample in random_batch([2, 0, 3])]
    numbered = with_object_ids(targets)
    assert [t.get(OBJECT_FIELD).tolist() for t in numbered] == [[0, 1], [], [2, 3, 4]]
    assert not any(t.has(OBJECT_FIELD) for t in targets)
    assert with_object_ids([]) == []


def test_copies_keep_the_class_that_carries_regions():
    (sample,) = with_regions(random_batch([1]), [[0, 0, 20, 20]])
    (numbered,) = with_object_ids([sample["instances"]])
    assert type(numbered) is type(sample["instances"])
    assert numbered.ignored_regions.tensor.tolist() == [[0, 0, 20, 20]]


def test_fields_of_an_earlier_step_are_dropped_and_others_kept():
    proposals = Instances(IMAGE_SIZE, proposal_boxes=Boxes(BOXES), level=torch.arange(4))
    assert without_step_fields([proposals])[0] is proposals
    proposals.set(OBJECT_FIELD, torch.arange(4))
    proposals.set(IMPORTANCE_FIELD, torch.ones(4))
    (clean,) = without_step_fields([proposals])
    assert set(clean.get_fields()) == {"proposal_boxes", "level"}
    assert proposals.has(OBJECT_FIELD)


def test_proposals_get_the_class_of_their_object_or_the_number_of_classes():
    candidates = match_proposals(MATCHER, Boxes(BOXES), target(), NUM_CLASSES)
    assert candidates.classes.tolist() == [2, 2, 0, 3]
    assert candidates.objects.tolist()[:3] == [0, 0, 1]
    torch.testing.assert_close(candidates.ious, tensor([1.0, 0.9, 1.0, 0.0]))


def test_proposals_that_the_matcher_ignores_have_class_minus_1():
    matcher = Matcher([0.5, 0.95], [0, -1, 1], allow_low_quality_matches=False)
    candidates = match_proposals(matcher, Boxes(BOXES), target(), NUM_CLASSES)
    assert candidates.classes.tolist() == [2, -1, 0, 3]


def test_without_objects_all_proposals_are_negative():
    candidates = match_proposals(MATCHER, Boxes(BOXES), target((), ()), NUM_CLASSES)
    assert candidates.classes.tolist() == [3] * 4
    assert candidates.objects.tolist() == [0] * 4
    assert candidates.ious.tolist() == [0.0] * 4


def test_negatives_inside_regions_are_ignored_only_if_a_threshold_is_given():
    objects = target()
    (sample,) = with_regions([{"instances": objects}], [[60, 60, 90, 90], [0, 0, 20, 20]])
    args = MATCHER, Boxes(BOXES), sample["instances"], NUM_CLASSES
    assert match_proposals(*args).classes.tolist() == [2, 2, 0, 3]
    assert match_proposals(*args, 0.5).classes.tolist() == [2, 2, 0, -1]


def test_samples_get_every_gt_field_of_their_object_and_the_importance_of_negatives():
    (objects,) = with_object_ids([target()])
    objects.gt_masks = tensor([[7.0], [8.0]])
    objects.other = tensor([1, 2])
    proposals = Instances(IMAGE_SIZE, proposal_boxes=Boxes(BOXES), level=torch.arange(4))
    candidates = match_proposals(MATCHER, proposals.proposal_boxes, objects, NUM_CLASSES)
    choice = Choice(tensor([2, 0]), tensor([3]), negative_importance=tensor([0.25]))
    samples = label_samples(proposals, candidates, objects, choice, choice.indices)
    assert samples.gt_classes.tolist() == [0, 2, 3]
    assert samples.level.tolist() == [2, 0, 3]
    assert samples.gt_masks.tolist()[:2] == [[8.0], [7.0]]
    assert samples.get(OBJECT_FIELD).tolist()[:2] == [1, 0]
    assert samples.get(IMPORTANCE_FIELD).tolist() == [1.0, 1.0, 0.25]
    assert not samples.has("other")


def test_samples_without_objects_have_classes_alone():
    proposals = Instances(IMAGE_SIZE, proposal_boxes=Boxes(BOXES))
    candidates = match_proposals(MATCHER, Boxes(BOXES), target((), ()), NUM_CLASSES)
    choice = Choice(tensor([], dtype=torch.int64), tensor([1, 3]))
    samples = label_samples(proposals, candidates, target((), ()), choice, choice.indices)
    assert set(samples.get_fields()) == {"proposal_boxes", "gt_classes"}
    assert samples.gt_classes.tolist() == [3, 3]


def test_rows_of_images_count_on_from_image_to_image():
    indices = [tensor([1, 0]), tensor([], dtype=torch.int64), tensor([2])]
    assert rows_of_images(indices, [4, 2, 3]).tolist() == [1, 0, 8]
    assert rows_of_images([], []).tolist() == []
