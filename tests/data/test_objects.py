import copy
import math

import numpy as np
import pytest
from detectron2.structures import BoxMode

from pisa_d2.data.objects import Objects


@pytest.fixture
def dicts():
    """Make 30 images with up to five annotations each, and one without a list of them."""
    rng = np.random.default_rng(1)
    records = [
        {
            "file_name": f"{i}.jpg",
            "width": 9 + i,
            "height": 7,
            "annotations": [
                {
                    "bbox": [1, 1, 5, 5],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": j,
                    "iscrowd": 1,
                }
                for j in range(rng.integers(6))
            ],
        }
        for i in range(30)
    ]
    return [*records[:20], {"file_name": "without.jpg"}, *records[20:]]


def test_values_of_all_annotations_are_in_the_order_of_images_and_annotations(dicts):
    objects = Objects(dicts)
    pairs = [
        (image, annotation)
        for image, record in enumerate(dicts)
        for annotation in record.get("annotations", [])
    ]
    assert objects.owner.tolist() == [image for image, _ in pairs]
    assert objects.annotations == [annotation for _, annotation in pairs]
    names = [("bbox", "boxes"), ("bbox_mode", "modes"), ("category_id", "categories")]
    for key, name in [*names, ("iscrowd", "crowds")]:
        assert getattr(objects, name) == [annotation[key] for _, annotation in pairs]
    assert objects.sizes().tolist() == [
        [dicts[image]["width"], dicts[image]["height"]] for image, _ in pairs
    ]
    for i, (image, _) in enumerate(pairs):
        assert objects.file(i) == f"'{dicts[image]['file_name']}'"


def test_keys_that_are_missing_have_the_values_that_detectron2_assumes():
    objects = Objects([{"height": 5, "annotations": [{}]}])
    assert (objects.boxes, objects.categories, objects.crowds) == ([None], [None], [0])
    assert objects.modes == [BoxMode.XYXY_ABS]
    np.testing.assert_equal(objects.sizes(), [[math.nan, 5.0]])
    assert objects.file(0) == "'None'"


@pytest.mark.parametrize("dicts", [[], [{"annotations": []}], [{"file_name": "0.jpg"}]])
def test_a_dataset_without_annotations_has_no_objects(dicts):
    objects = Objects(dicts)
    assert objects.annotations == [] and objects.sizes().shape == (0, 2)
    assert objects.keep(np.zeros(0, dtype=bool)).dicts == dicts


def test_the_objects_that_are_kept_stay_in_their_images_in_their_order(dicts):
    objects, before = Objects(dicts), copy.deepcopy(dicts)
    kept = np.random.default_rng(2).random(len(objects.annotations)) < 0.7
    expected, i = [], 0
    for record in before:
        own = []
        for annotation in record.get("annotations", []):
            if kept[i]:
                own.append(annotation)
            i += 1
        expected.append({**record, "annotations": own} if "annotations" in record else record)
    result = objects.keep(kept)
    assert result.dicts == expected
    assert dicts == before
    assert result.owner.tolist() == objects.owner[kept].tolist()


def test_only_images_with_a_replaced_annotation_are_copied(dicts):
    objects = Objects(dicts)
    annotations = list(objects.annotations)
    annotations[0], annotations[-1] = {"bbox": [0, 0, 1, 1]}, None
    result = objects.replace(annotations)
    assert result.annotations == annotations[:-1]
    changed = {int(objects.owner[0]), int(objects.owner[-1])}
    same = [new is old for new, old in zip(result.dicts, dicts, strict=True)]
    assert {image for image, is_same in enumerate(same) if not is_same} == changed
