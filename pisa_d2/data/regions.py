"""
The way of regions to ignore from annotations to the targets of a model, see
:mod:`pisa_d2.regions`.
"""

from collections.abc import Callable
from typing import Any

from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask

from ..regions import TargetsWithRegions

# The class of annotations that are regions, for a mapper.
REGION = -1


def is_region(annotation: dict[str, Any]) -> bool:
    """Return whether an annotation in Detectron2's format is a region to ignore."""
    return bool(annotation.get("iscrowd") or annotation.get("ignore"))


def without_regions_alone(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Leave out images with regions to ignore but no object, as Detectron2 does with crowds.

    Raises:
        ValueError: no image remains.
    """
    kept = [
        record
        for record in records
        if not record.get("annotations") or not all(map(is_region, record["annotations"]))
    ]
    if records and not kept:
        raise ValueError(
            "All images of DATASETS.TRAIN have only regions to ignore (iscrowd or ignore is 1) "
            "and no object to train on."
        )
    return kept


def with_regions_as_crowds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy a dataset and set ``iscrowd`` to 1 for all regions to ignore."""
    return [
        {
            **record,
            "annotations": [{**x, "iscrowd": 1} if is_region(x) else x for x in annotations],
        }
        if (annotations := record.get("annotations"))
        else record
        for record in records
    ]


class KeepRegions:
    """
    A mapper of dataset dicts that makes :class:`TargetsWithRegions` with the help of another
    mapper. To that mapper, regions are objects of class :data:`REGION`, which it resizes, flips and
    crops like other objects. It must not depend on their class otherwise.
    """

    def __init__(self, mapper: Callable[[dict], dict | None]) -> None:
        """
        Args:
            mapper: turns a dataset dict into a model's input, such as Detectron2's
                ``DatasetMapper``.
        """
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict | None:
        """
        Map an image.

        Args:
            dataset_dict: the dict of one image, in Detectron2's format.

        Returns:
            The mapper's result, whose "instances" carry the regions in addition to the objects.
        """
        annotations = dataset_dict.get("annotations")
        if annotations is not None:
            dataset_dict = {**dataset_dict, "annotations": _as_objects(annotations)}
        inputs = self.mapper(dataset_dict)
        if inputs is not None and "instances" in inputs:
            inputs["instances"] = _split(inputs["instances"])
        return inputs


def _as_objects(annotations: list[dict]) -> list[dict]:
    objects = [annotation for annotation in annotations if not is_region(annotation)]
    # Either all objects of an image have masks, or none; the same holds for keypoints.
    like = objects[0] if objects else {}
    return [_as_object(x, like) if is_region(x) else x for x in annotations]


def _as_object(region: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "bbox": region["bbox"],
        "bbox_mode": region["bbox_mode"],
        "category_id": REGION,
        "iscrowd": 0,
    }
    if "segmentation" in like:
        x1, y1, x2, y2 = BoxMode.convert(region["bbox"], region["bbox_mode"], BoxMode.XYXY_ABS)
        polygons = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        is_polygon = isinstance(like["segmentation"], list)
        shown["segmentation"] = polygons if is_polygon else _rle(polygons, like["segmentation"])
    if "keypoints" in like:
        shown["keypoints"] = [0.0] * len(like["keypoints"])
    return shown


def _rle(polygons: list[list[float]], like: dict[str, Any]) -> dict[str, Any]:
    # Run-length codes like the others: to crop polygons takes a library that may not be installed.
    return mask.merge(mask.frPyObjects(polygons, *like["size"]))


def _split(instances: Instances) -> TargetsWithRegions:
    is_object = instances.gt_classes != REGION
    objects = instances[is_object]
    regions = Boxes(instances.gt_boxes.tensor[~is_object])
    regions = regions[regions.nonempty()]
    return TargetsWithRegions(instances.image_size, regions, **objects.get_fields())
