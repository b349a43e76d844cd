import copy
import json

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from helpers import make_coco, make_voc, noise_image, small_cfg
from pycocotools import mask

from pisa_d2.data import KeepRegions, register_datasets
from pisa_d2.data.catalog import register_dataset
from pisa_d2.data.regions import is_region, with_regions_as_crowds, without_regions_alone
from pisa_d2.engine import build_train_loader
from pisa_d2.regions import TargetsWithRegions

BOXES = [[4, 6, 20, 30], [30, 5, 60, 40], [24, 20, 40, 47]]
# In an image 64 pixels wide and 48 high.
AUGMENTATIONS = {
    "none": [],
    "resized": [T.Resize((96, 100))],
    "flipped": [T.RandomFlip(1.0)],
    "cropped": [T.CropTransform(10, 8, 36, 24)],
    "all": [T.Resize((96, 128)), T.RandomFlip(1.0), T.CropTransform(20, 8, 72, 60)],
}
BITMASKS = {"use_instance_mask": True, "instance_mask_format": "bitmask"}
MODELS = {
    "boxes": {},
    "polygons": {"use_instance_mask": True},
    "bitmasks": BITMASKS,
    "tight bitmasks": {**BITMASKS, "recompute_boxes": True},
    "keypoints": {"use_keypoint": True, "keypoint_hflip_indices": [1, 0]},
}


def as_object(box, rle=False):
    x1, y1, x2, y2 = box
    polygons = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return {
        "bbox": box,
        "bbox_mode": 0,
        "category_id": 1,
        "segmentation": mask.merge(mask.frPyObjects(polygons, 48, 64)) if rle else polygons,
        "keypoints": [x1, y1, 2, x2, y2, 2],
    }


def as_region(box, flag="iscrowd"):
    x1, y1, x2, y2 = box
    size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "bbox_mode": 1}
    shape = {"size": [48, 64], "counts": b"a mask that nobody decodes"}
    return {**size, "category_id": 0, flag: 1, "segmentation": shape}


@pytest.fixture
def record(tmp_path):
    noise_image(tmp_path / "0.jpg", 0)
    return {"file_name": str(tmp_path / "0.jpg"), "height": 48, "width": 64, "annotations": []}


def needs_shapely(augmentation, options):
    if options == "polygons" and augmentation in ("cropped", "all"):
        pytest.importorskip("shapely")


def mapper(augmentations, **options):
    return DatasetMapper(is_train=True, augmentations=augmentations, image_format="BGR", **options)


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_regions_go_where_objects_go_and_change_none(record, augmentation, options, flag):
    needs_shapely(augmentation, options)
    plain = mapper(AUGMENTATIONS[augmentation], **MODELS[options])
    objects = [as_object(box, "bitmasks" in options) for box in BOXES]
    record["annotations"] = objects
    theirs = plain(copy.deepcopy(record))["instances"]
    record["annotations"] = [as_region(BOXES[0], flag), *objects]
    record["annotations"] += [as_region(box, flag) for box in BOXES[1:]]
    before = copy.deepcopy(record)
    inputs = KeepRegions(plain)(record)
    assert record == before and "annotations" not in inputs
    ours = inputs["instances"]

    assert isinstance(ours, TargetsWithRegions) and len(theirs) == 3
    torch.testing.assert_close(ours.ignored_regions.tensor, theirs.gt_boxes.tensor)
    assert ours.get_fields().keys() == theirs.get_fields().keys()
    assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
    assert torch.equal(ours.gt_classes, theirs.gt_classes)
    if theirs.has("gt_masks"):
        areas = ours.gt_masks.get_bounding_boxes().tensor
        assert torch.equal(areas, theirs.gt_masks.get_bounding_boxes().tensor)
    if theirs.has("gt_keypoints"):
        assert torch.equal(ours.gt_keypoints.tensor, theirs.gt_keypoints.tensor)


@pytest.mark.parametrize("options", MODELS)
def test_a_crop_clips_regions_and_drops_those_outside(record, options):
    needs_shapely("cropped", options)
    boxes = [[0, 0, 20, 20], [40, 0, 64, 20], [0, 0, 64, 48], [5, 5, 10, 40]]
    record["annotations"] = [as_object([12, 10, 30, 30], "bitmasks" in options)]
    record["annotations"] += map(as_region, boxes)
    crop = [T.CropTransform(10, 8, 30, 30)]
    ours = KeepRegions(mapper(crop, **MODELS[options]))(record)["instances"]
    assert ours.ignored_regions.tensor.tolist() == [[0, 0, 10, 12], [0, 0, 30, 30]]
    assert ours.gt_boxes.tensor.tolist() == [[2, 2, 20, 22]]


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("regions", [0, 2])
def test_an_image_without_objects_keeps_its_regions(record, options, regions):
    settings = {**MODELS[options], "recompute_boxes": False}
    record["annotations"] = [as_region(box) for box in BOXES[:regions]]
    ours = KeepRegions(mapper([], **settings))(record)["instances"]
    assert len(ours) == 0 and len(ours.ignored_regions) == regions
    assert ours.get_fields().keys() == {"gt_boxes", "gt_classes"}


def test_without_annotations_and_for_evaluation_the_mapper_has_its_way(record):
    del record["annotations"]
    assert "instances" not in KeepRegions(mapper([]))(record)
    assert KeepRegions(lambda record: None)({"annotations": [as_region(BOXES[0])]}) is None


@pytest.mark.parametrize("keeps_empty", [True, False])
@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
def test_an_image_with_regions_alone_is_kept_if_empty_ones_are(record, flag, keeps_empty):
    kinds = {0: [as_object(BOXES[0])], 1: [as_region(BOXES[0], flag)], 2: []}
    records = [{**record, "image_id": i, "annotations": x} for i, x in kinds.items()]
    register_dataset("mixed", lambda: copy.deepcopy(records), thing_classes=["a", "b"])
    cfg = small_cfg(
        *("DATASETS.TRAIN", "('mixed',)", "MODEL.IGNORED_REGIONS.ENABLED", True),
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", not keeps_empty, "SOLVER.IMS_PER_BATCH", 3),
        *("DATALOADER.NUM_WORKERS", 0, "SEED", 1),
    )
    seen = {}
    batches = iter(build_train_loader(cfg))
    for _ in range(3):
        for sample in next(batches):
            seen[sample["image_id"]] = sample["instances"]
    assert sorted(seen) == ([0, 1, 2] if keeps_empty else [0])
    for i, targets in seen.items():
        numbers = len(targets), len(targets.ignored_regions)
        assert numbers == {0: (1, 0), 1: (0, 1), 2: (0, 0)}[i]


def test_a_dataset_of_regions_alone_is_refused(record):
    records = [{**record, "image_id": 0, "annotations": [as_region(BOXES[0], "ignore")]}]
    register_dataset("regions", lambda: records, thing_classes=["a", "b"])
    cfg = small_cfg("DATASETS.TRAIN", "('regions',)", "MODEL.IGNORED_REGIONS.ENABLED", True)
    with pytest.raises(ValueError, match="only regions to ignore"):
        build_train_loader(cfg)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_ignored_and_difficult_objects_of_a_users_data_are_regions_if_switched_on(
    tmp_path, kind, on
):
    if kind == "coco":
        path = make_coco(tmp_path, num_images=2)
        content = json.loads(path.read_text())
        for annotation in content["annotations"][1::2]:
            annotation["ignore"] = 1
        path.write_text(json.dumps(content))
        register_datasets([["mine", str(path), str(tmp_path / "images")]])
    else:
        make_voc(tmp_path, num_images=2)
        for path in (tmp_path / "Annotations").iterdir():
            head, _, tail = path.read_text().rpartition("<difficult>0")
            path.write_text(f"{head}<difficult>1{tail}")
        register_datasets([["mine", str(tmp_path)]])
    cfg = small_cfg(
        *("DATASETS.TRAIN", "('mine',)", "MODEL.IGNORED_REGIONS.ENABLED", on),
        *("SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "SEED", 1),
        *("INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.RANDOM_FLIP", "none"),
    )
    for sample in next(iter(build_train_loader(cfg))):
        targets = sample["instances"]
        assert len(targets) == (1 if on else 2)
        assert isinstance(targets, TargetsWithRegions) == on
        if on:
            x1, _, x2, _ = targets.ignored_regions.tensor[0].tolist()
            assert len(targets.ignored_regions) == 1 and (x1, x2) == (24, 40)


def test_crowds_and_annotations_to_ignore_are_regions():
    kinds = [{}, {"iscrowd": 0, "ignore": 0}, {"iscrowd": 1}, {"ignore": 1}, {"ignore": True}]
    assert [is_region(annotation) for annotation in kinds] == [False, False, True, True, True]


def test_regions_become_crowds_on_copies_and_objects_stay():
    annotations = [{"bbox": BOXES[0]}, {"ignore": 1}, {"iscrowd": 1}]
    records = [{"image_id": 1, "annotations": annotations}, {"annotations": []}, {"image_id": 3}]
    before = copy.deepcopy(records)
    of_first, *others = with_regions_as_crowds(records)
    assert records == before and others == before[1:]
    changed = [annotations[0], {"ignore": 1, "iscrowd": 1}, annotations[2]]
    assert of_first == {"image_id": 1, "annotations": changed}


def test_images_with_regions_alone_are_left_out_and_images_without_annotations_kept():
    region, thing = as_region(BOXES[0]), as_object(BOXES[1])
    mixed, alone, empty, unlabelled = (
        {"annotations": [region, thing]},
        {"annotations": [region, region]},
        {"annotations": []},
        {"image_id": 3},
    )
    kept = without_regions_alone([mixed, alone, empty, unlabelled])
    assert kept == [mixed, empty, unlabelled]
    assert without_regions_alone([]) == []
    with pytest.raises(ValueError, match="All images of DATASETS.TRAIN have only regions to ign"):
        without_regions_alone([alone, alone])
