"""
Checks of the content of a COCO json before it is indexed. Without them, Detectron2 and pycocotools
would fail with a KeyError, or silently drop images and objects.
"""

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from pycocotools.coco import COCO

from .formats import format_of_json
from .mask_checks import MASK_FAULT, segmentation_fault
from .messages import Warn, named


class AnnotationError(ValueError):
    """A fault in an annotation file; the caller adds the dataset and the file."""


def _entry(kind: str, index: int, entry: Any) -> str:
    keys = [key for key in ("id", "name", "file_name", "image_id") if key in entry]
    values = ", ".join(f"{key} {entry[key]!r}" for key in keys)
    return f"{kind}[{index}]" + (f" ({values})" if values else "")


def _check_list(content: dict, kind: str) -> list[dict]:
    if not isinstance(content.get(kind), list):
        known = format_of_json(content)
        if known is not None:
            raise AnnotationError(f"The file is {known}.")
        has = named([repr(key) for key in content])
        raise AnnotationError(
            f"COCO's format has a list of {kind!r} at the top level, but this file has {has}. "
            "Export it in COCO's format, or add the list."
        )
    for index, entry in enumerate(content[kind]):
        if not isinstance(entry, dict):
            raise AnnotationError(f"{kind}[{index}] = {entry!r} must be an object with keys.")
    return content[kind]


def _check_ids(entries: list[dict], kind: str) -> list[Any]:
    """Return the ids, after a check that none is missing, and that they are unique and sortable."""
    ids = [entry.get("id") for entry in entries]
    try:
        unique = len(set(ids)) == len(ids)
    except TypeError:
        index = next(i for i, id_ in enumerate(ids) if not isinstance(id_, Hashable))
        entry = _entry(kind, index, entries[index])
        raise AnnotationError(f"{entry}: the id must be a number or a string.") from None
    if None in ids:
        index = ids.index(None)
        raise AnnotationError(f"{_entry(kind, index, entries[index])} has no id: give it one.")
    if not unique:
        double, count = Counter(ids).most_common(1)[0]
        first, second = [i for i, id_ in enumerate(ids) if id_ == double][:2]
        raise AnnotationError(
            f"{count} {kind} have the id {double!r}, such as {_entry(kind, first, entries[first])} "
            f"and {_entry(kind, second, entries[second])}. Give each its own id."
        )
    if len({isinstance(id_, str) for id_ in ids}) > 1:
        raise AnnotationError(f"Some ids of {kind} are numbers, others strings: use one type.")
    return ids


def _other_type(id_: Any, known: Sequence[Any]) -> str:
    """Make the hint for an id that is known, but as a string instead of a number or vice versa."""
    same = next((other for other in known if str(other) == str(id_)), None)
    return "" if same is None else f" (there is {same!r}: a number and a string differ)"


def _check_categories(content: dict) -> list[Any]:
    categories = _check_list(content, "categories")
    if not categories:
        raise AnnotationError("It lists no categories: a model needs at least one.")
    ids = _check_ids(categories, "categories")
    names: dict[str, int] = {}
    for index, category in enumerate(categories):
        name = category.get("name")
        if not isinstance(name, str | int | float) or name == "":
            entry = _entry("categories", index, category)
            raise AnnotationError(f"{entry} has no name, or one that is not a string: give it one.")
        category["name"] = name = str(name)
        if name in names:
            first = _entry("categories", names[name], categories[names[name]])
            entry = _entry("categories", index, category)
            raise AnnotationError(
                f"{first} and {entry} have the same name. If they are one class, give their "
                "annotations one category_id; otherwise rename one."
            )
        names[name] = index
    return ids


def _check_images(content: dict) -> list[Any]:
    images = _check_list(content, "images")
    for index, image in enumerate(images):
        if not isinstance(image.get("file_name"), str):
            entry = _entry("images", index, image)
            raise AnnotationError(f"{entry} has no file_name, or one that is not a string.")
        for key in ("width", "height"):  # the check of sizes refuses None
            image.setdefault(key, None)
    return _check_ids(images, "images")


def _check_references(
    annotations: list[dict], images: list[Any], categories: list[Any], warn: Warn
) -> None:
    for key, known in (("category_id", categories), ("image_id", images)):
        known_set = set(known)
        try:
            lost = [i for i, a in enumerate(annotations) if a.get(key) not in known_set]
        except TypeError:
            lost = [i for i, a in enumerate(annotations) if not isinstance(a.get(key), Hashable)]
            entry = _entry("annotations", lost[0], annotations[lost[0]])
            raise AnnotationError(f"{entry}: {key} must be a number or a string.") from None
        if not lost:
            continue
        first = annotations[lost[0]]
        entry = _entry("annotations", lost[0], first)
        hint = _other_type(first.get(key), known)
        if key == "category_id":
            raise AnnotationError(
                f"{entry} has category_id = {first.get(key)!r}, which 'categories' does not list"
                f"{hint}; it has {named([repr(c) for c in known])}. Add it, or correct the "
                "annotation."
            )
        if len(lost) == len(annotations):
            raise AnnotationError(
                f"No annotation belongs to an image of the file: {entry} has image_id = "
                f"{first.get(key)!r}{hint}. Use the ids of 'images'."
            )
        entries = [_entry("annotations", i, annotations[i]) for i in lost]
        warn(
            f"{len(lost)} of {len(annotations)} annotations belong to no image of the file and are "
            f"ignored{hint}: {named(entries)}."
        )


def _prepare_segmentations(annotations: list[dict], masks: bool, warn: Warn) -> list[dict]:
    """
    Keep Detectron2 from dropping objects whose polygons are too short. A model without masks needs
    only the box; for a model with masks, a warning names them.
    """
    kept = []
    dropped = []
    for index, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if segmentation:
            fault = segmentation_fault(segmentation)
            if fault is not None and masks:
                dropped.append(f"{_entry('annotations', index, annotation)} {fault}")
                continue
            if fault is not None:
                del annotation["segmentation"]
                annotation[MASK_FAULT] = fault
        kept.append(annotation)
    if dropped:
        warn(f"dropped {len(dropped)} object(s) without a usable mask: {named(dropped)}.")
    return kept


def check_coco(content: Any, file: str, masks: bool, warn: Warn, strict: bool = True) -> None:
    """
    Check the parsed content of a COCO json, and prepare it in place for Detectron2's
    ``load_coco_json``: names of categories become strings; empty boxes and (for a model without
    masks) unusable segmentations are removed, since the loader would fail on them.

    Args:
        content: the result of ``json.load``.
        file: its path. As in Detectron2, annotation ids may repeat in COCO's "minival" files.
        masks: whether the model needs masks.
        warn: called with each warning.
        strict: whether to refuse annotation ids that are missing or repeat, and objects marked
            ``ignore``, as Detectron2's loader does.

    Raises:
        AnnotationError: an entry is faulty. The message names it and the fix.
    """
    if not isinstance(content, dict):
        known = format_of_json(content) or "not an object with images, annotations and categories"
        raise AnnotationError(f"The file is {known}.")
    categories = _check_categories(content)
    images = _check_images(content)
    if "annotations" not in content:  # a set without labels, such as COCO's test-dev
        return
    annotations = _check_list(content, "annotations")
    if strict and "minival" not in file:
        _check_ids(annotations, "annotations")
    _check_references(annotations, images, categories, warn)
    for index, annotation in enumerate(annotations):
        if strict and annotation.get("ignore"):
            raise AnnotationError(
                f"{_entry('annotations', index, annotation)} has ignore = "
                f"{annotation['ignore']!r}, which Detectron2's loader does not support: name the "
                "file in DATASETS.REGISTER instead, or set iscrowd = 1."
            )
        if not isinstance(box := annotation.get("bbox"), list) or not box:
            annotation.pop("bbox", None)  # Detectron2 would fail on it
    content["annotations"] = _prepare_segmentations(annotations, masks, warn)


@contextlib.contextmanager
def checking_coco(file: str, masks: bool, warn: Warn) -> Iterator[None]:
    """
    Call :func:`check_coco` on what pycocotools has parsed before it is indexed, so that a json of
    hundreds of megabytes is not parsed twice.
    """
    create_index = COCO.createIndex

    def check_and_create_index(self: COCO) -> None:
        check_coco(self.dataset, file, masks, warn)
        create_index(self)

    COCO.createIndex = check_and_create_index
    try:
        yield
    finally:
        COCO.createIndex = create_index
