"""
From annotations that mark regions to ignore to targets that carry them, see
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
    """Whether an annotation, in Detectron2's format, is a region to ignore and no object."""
    return bool(annotation.get("iscrowd") or annotation.get("ignore"))


def without_regions_alone(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Leave out the images that have regions to ignore and no object, as Detectron2 does if these are
    crowds.

    Raises:
        ValueError: no image is left.
    """
    kept = [
        record
        for record in records
        if not record.get("annotations") or not all(map(is_region, record["annotations"]))
    ]
    if records and not kept:
        raise ValueError(
            "All images of DATASETS.TRAIN have nothing but regions to ignore (iscrowd or ignore "
            "is 1), and no object to train on."
        )
    return kept


def with_regions_as_crowds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of a dataset in which ``iscrowd`` is 1 for all regions to ignore."""
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
    A mapper of dataset dicts that makes :class:`TargetsWithRegions`, by means of any other mapper
    of images with objects: to this one, regions are objects of class :data:`REGION`, so that it
    resizes, flips and crops them as it does objects. It must not ask for more of their class.
    """

    def __init__(self, mapper: Callable[[dict], dict | None]) -> None:
        """
        Args:
            mapper: makes a model's input of a dataset dict, such as Detectron2's ``DatasetMapper``.
        """
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict | None:
        """
        Args:
            dataset_dict: of one image, in Detectron2's format.

        Returns:
            The mapper's inputs, whose "instances" carry the regions in addition to the objects.
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
    # Objects of an image have masks, or keypoints, all or none.
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
    # Of the kind that the others are: cropped, polygons need a library that these may do without.
    return mask.merge(mask.frPyObjects(polygons, *like["size"]))


def _split(instances: Instances) -> TargetsWithRegions:
    is_object = instances.gt_classes != REGION
    objects = instances[is_object]
    regions = Boxes(instances.gt_boxes.tensor[~is_object])
    regions = regions[regions.nonempty()]
    return TargetsWithRegions(instances.image_size, regions, **objects.get_fields())
