"""The bootstrap of a head study, by other routes."""

import numpy as np
import pytest
from head_study.bootstrap import Matches, average_precision, bootstrap_error, matches_of, resamples
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def random_detections(num_images=6, num_classes=3, seed=0):
    """Ground truth and detections in COCO's format; the last class has no object."""
    generator = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(num_images):
        for _ in range(generator.integers(0, 6)):
            x, y, w, h = *generator.uniform(0, 80, 2), *generator.uniform(10, 40, 2)
            category = int(generator.integers(num_classes - 1))
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(generator.random() < 0.15),
                }
            )
            for _ in range(generator.integers(0, 4)):
                box = np.array([x, y, w, h]) + generator.normal(0, 3, 4)
                category = int(generator.integers(num_classes))
                found.append({"image_id": image, "category_id": category, "bbox": box.tolist()})
    for detection in found:
        detection["score"] = float(generator.random())
    return truth, found


def coco_eval(truth, found, num_images, num_classes=3):
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "width": 128, "height": 128} for i in range(num_images)],
        "annotations": truth,
        "categories": [{"id": i, "name": str(i)} for i in range(num_classes)],
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    return evaluation


@pytest.mark.parametrize("seed", range(5))
def test_with_every_image_once_it_is_coco_ap(seed):
    truth, found = random_detections(seed=seed)
    evaluation = coco_eval(truth, found, 6)
    matches = matches_of(evaluation)
    evaluation.accumulate()
    evaluation.summarize()
    ap = average_precision(matches, np.ones((1, 6), dtype=int))
    assert ap == pytest.approx(100 * evaluation.stats[0])
    assert evaluation.stats[0] > 0.02


@pytest.mark.parametrize("seed", range(5))
def test_a_resample_has_the_ap_of_a_dataset_with_repeated_and_missing_images(seed):
    truth, found = random_detections(seed=seed)
    weights = resamples(6, 4, seed=seed)
    assert (weights.sum(axis=1) == 6).all() and (weights == 0).any() and (weights > 1).any()
    of_resamples = average_precision(matches_of(coco_eval(truth, found, 6)), weights)
    for times, ap in zip(weights, of_resamples, strict=True):
        chosen = np.repeat(np.arange(6), times)
        copies = [
            [{**x, "image_id": place} for place, i in enumerate(chosen) for x in part
             if x["image_id"] == i]
            for part in (truth, found)
        ]  # fmt: skip
        for number, annotation in enumerate(copies[0], start=1):
            annotation["id"] = number
        evaluation = coco_eval(*copies, 6)
        evaluation.accumulate()
        evaluation.summarize()
        assert ap == pytest.approx(100 * evaluation.stats[0])


def test_a_resample_without_any_object_has_no_ap():
    matches = Matches(
        np.array([0]), np.ones((10, 1), bool), np.zeros((10, 1), bool), np.array([1, 0])
    )
    ap = average_precision([matches], np.array([[1, 1], [0, 2]]))
    assert ap[0] == pytest.approx(100)
    assert np.isnan(ap[1])


def test_the_error_of_a_bootstrap_is_that_of_the_mean_over_images():
    of_images = np.random.default_rng(0).normal(0, 1, 50)
    differences = resamples(50, 4000, seed=1) @ of_images / 50
    expected = of_images.std() / np.sqrt(50)
    assert bootstrap_error(differences) == pytest.approx(expected, rel=0.05)
