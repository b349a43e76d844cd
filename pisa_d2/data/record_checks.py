"""Checks of the images, classes and crowds of a dataset in Detectron2's format, file by file."""

import math
from collections.abc import Collection

import numpy as np
from detectron2.data import MetadataCatalog

from .formats import lists_annotations
from .messages import Warn, named
from .needs import Needs
from .objects import Objects
from .regions import is_region


def with_whole_sizes(dicts: list[dict], name: str) -> list[dict]:
    """
    Make the sizes of images whole numbers, such as 640 for 640.0.

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """
    checked = []
    for record in dicts:
        whole = {}
        for key in ("width", "height"):
            size = record.get(key, 1)
            if type(size) is int and size > 0:
                continue
            number = isinstance(size, int | float | np.number) and not isinstance(size, bool)
            if not number or not float(size).is_integer() or size < 1:
                raise ValueError(
                    f"Dataset '{name}': '{record.get('file_name')}' has {key} = {size!r}, which "
                    "must be a whole number of pixels. Write the image's size in the annotations."
                )
            whole[key] = int(size)
        checked.append({**record, **whole} if whole else record)
    return checked


def check_classes(objects: Objects, name: str, needs: Needs) -> None:
    """
    Check the classes of a dataset against its metadata and the model.

    Raises:
        ValueError: a category id is out of range, or the model has a different number of classes.
    """
    things = MetadataCatalog.get(name).get("thing_classes")
    limits = [] if things is None else [(len(things), "the dataset has")]
    classes = needs.classes
    limits += [] if classes is None else [(classes.num, f"{classes.key} is")]
    categories = objects.categories
    num, what = min(limits, default=(math.inf, ""))
    plain = set(map(type, categories)) <= {int} and min(categories, default=0) >= 0
    if not plain or max(categories, default=0) >= num:
        for i, category in enumerate(categories):
            if not isinstance(category, int | np.integer) or not 0 <= category < num:
                allowed = f", but {what} {num}, so that ids go from 0 to {num - 1}" if what else ""
                raise ValueError(
                    f"Dataset '{name}': {objects.file(i)} has category_id = {category!r}{allowed}. "
                    "Fix the annotation or the number of classes."
                )
    if things is not None and classes is not None and len(things) != classes.num:
        raise ValueError(
            f"{classes.key} = {classes.num}, but dataset '{name}' has {len(things)} class(es): "
            f"{', '.join(things)}. Set the key to {len(things)}."
        )


def with_known_crowds(objects: Objects, name: str) -> Objects:
    """
    Make iscrowd 0 or 1, since Detectron2 takes everything but 0 for a crowd.

    Raises:
        ValueError: a value of iscrowd is neither.
    """
    crowds = objects.crowds
    if all(crowd in (0, 1) for crowd in _distinct(crowds)):
        return objects
    annotations = []
    for i, (crowd, annotation) in enumerate(zip(crowds, objects.annotations, strict=True)):
        if crowd not in (None, 0, 1, "0", "1"):
            raise ValueError(
                f"Dataset '{name}': an annotation of {objects.file(i)} has iscrowd = {crowd!r}: "
                "write 0 for an object, 1 for a crowd."
            )
        annotations.append({**annotation, "iscrowd": int(crowd or 0)})
    return objects.replace(annotations)


def _distinct(values: list) -> Collection:
    try:
        return set(values)
    except TypeError:  # some cannot be hashed
        return values


def check_has_objects(objects: Objects, name: str, needs: Needs, warn: Warn) -> None:
    """
    Check that a dataset has objects; warn about images with only crowds.

    Raises:
        ValueError: it has none, but its purpose needs some.
    """
    crowds = np.array(objects.crowds, dtype=bool)
    num_images = len(objects.dicts)
    total = np.bincount(objects.owner, minlength=num_images)
    crowded = np.flatnonzero((total > 0) & (np.bincount(objects.owner, ~crowds, num_images) == 0))
    if len(crowded) > 0:
        files = [f"'{objects.dicts[image].get('file_name')}'" for image in crowded.tolist()]
        warn(
            f"{len(files)} image(s) have only crowd boxes, which are not objects to train on: "
            f"{named(files)}."
        )
    if not crowds.all():
        return
    advice = "Check its annotation file: it must have boxes, and not all with iscrowd = 1."
    if needs.train and needs.objects:
        raise ValueError(
            f"Dataset '{name}' has {num_images} image(s) but no object to train on. {advice}"
        )
    if needs.test and _is_labelled(name):
        raise ValueError(
            f"Dataset '{name}' has {num_images} image(s) but no object to evaluate with. {advice} "
            "If it is meant to have no labels, remove the list of annotations."
        )


def describe_regions(objects: Objects, ignores_regions: bool) -> str:
    """Describe the crowds in a dataset for training and their treatment; "" without crowds."""
    if ignores_regions:
        num = sum(map(is_region, objects.annotations))
        return f"{num} annotation(s) are regions to ignore: iscrowd or ignore is 1." if num else ""
    num = sum(map(bool, objects.crowds))
    return (
        f"{num} crowd box(es) are left out, so negatives are taken from there. To ignore "
        "these regions, set MODEL.IGNORED_REGIONS.ENABLED to True."
        if num
        else ""
    )


def _is_labelled(name: str) -> bool:
    """Return whether a dataset is meant to have annotations, unlike COCO's test-dev."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in ("coco", "pascal_voc"):
        return False
    file = metadata.get("json_file")
    return file is None or lists_annotations(file)


def check_keypoint_names(name: str, num: int) -> None:
    """
    Check the names of keypoints in the metadata of a dataset for training.

    Raises:
        ValueError: the metadata does not name ``num`` keypoints, or not the pairs that are swapped
            when an image is flipped.
    """
    metadata = MetadataCatalog.get(name)
    names = metadata.get("keypoint_names")
    if names is None or metadata.get("keypoint_flip_map") is None:
        raise ValueError(
            f"Dataset '{name}' does not name its keypoints, which MODEL.KEYPOINT_ON needs for "
            f"flipped images: MetadataCatalog.get('{name}').set(keypoint_names=['left_eye', "
            "'right_eye', ...], keypoint_flip_map=[('left_eye', 'right_eye'), ...])."
        )
    if len(names) != num:
        raise ValueError(
            f"Dataset '{name}' names {len(names)} keypoints, {named(list(names))}, but "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num}: set it to {len(names)}."
        )
