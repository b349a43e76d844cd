"""COCO evaluation against the annotations that are loaded and checked."""

import contextlib
import copy
import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask
from pycocotools.coco import COCO

from .data.checks import usable_boxes
from .data.regions import with_regions_as_crowds

logger = logging.getLogger(__name__)

# A temporary name in Detectron2's catalogs.
_SCRATCH = "_pisa_d2_evaluation"


class CheckedCOCOEvaluator(COCOEvaluator):
    """
    Detectron2's COCO evaluator, with :func:`coco_truth` as the ground truth. On a well-formed COCO
    json the results are Detectron2's.

    Unlike Detectron2's, it never reads a file that an earlier evaluation left for a dataset without
    a json of its own.
    """

    def __init__(self, dataset_name: str, *, ignored_regions: bool = False, **kwargs: Any) -> None:
        """
        Args:
            dataset_name: a registered dataset.
            ignored_regions: see :func:`coco_truth`.
            kwargs: see Detectron2's ``COCOEvaluator``.
        """
        truth = coco_truth(dataset_name, ignored_regions)
        with _scratch(), tempfile.TemporaryDirectory() as folder:
            # The constructor reads a file and its metadata; both are replaced below.
            stub = Path(folder) / "stub.json"
            stub.write_text(json.dumps({"annotations": []} if "annotations" in truth else {}))
            MetadataCatalog.get(_SCRATCH).json_file = str(stub)
            super().__init__(_SCRATCH, **kwargs)
        self._metadata = MetadataCatalog.get(dataset_name)
        self._coco_api = index_coco(truth)


def coco_truth(name: str, ignored_regions: bool = False) -> dict[str, Any]:
    """
    Return the ground truth of a dataset in COCO's format, for evaluation: the annotations that
    loading the dataset yields, without unusable boxes, which count neither as found nor as missed.

    Areas, masks and everything else come from the dataset's json if it has one that lists these
    annotations. Annotations are numbered from 1, since pycocotools takes id 0 for unmatched. A
    missing or null ``iscrowd`` is 0, and a missing area is the area of the mask or box.

    Args:
        name: a registered dataset.
        ignored_regions: whether annotations with ``ignore: 1`` are crowds instead of objects.
    """
    with _quiet():
        loaded = DatasetCatalog.get(name)
    content = _read_json(name)
    class_ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    if content is not None:
        if "annotations" not in content:  # a set without labels
            return content
        if not any("annotations" in record for record in loaded):
            loaded, class_ids = _records_of(content), None
    records = usable_boxes(loaded)
    if ignored_regions:
        records = with_regions_as_crowds(records)
    truth = _select(content, records, class_ids) if content is not None else None
    if truth is None:
        truth = _convert(records, name)
        total = sum(len(record.get("annotations", [])) for record in loaded)
    else:
        total = len(content["annotations"])  # type: ignore[index]
    dropped = total - len(truth.get("annotations", []))
    if dropped:
        logger.warning(
            "Dataset '%s': evaluation leaves out %d of %d annotation(s), which were not loaded or "
            "have no usable box. They count neither as found nor as missed.",
            name,
            dropped,
            total,
        )
    return truth


def index_coco(content: dict[str, Any]) -> COCO:
    """Return pycocotools' API for ``content``, which is in COCO's format."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _read_json(name: str) -> dict[str, Any] | None:
    file = MetadataCatalog.get(name).get("json_file")
    # Detectron2's own evaluator leaves such a file in the metadata: an older state of the data.
    if file is None or Path(file).name == f"{name}_coco_format.json":
        return None
    with PathManager.open(file, "rb") as opened:
        return json.loads(opened.read())


def _records_of(content: dict[str, Any]) -> list[dict]:
    records = {image["id"]: {**image, "image_id": image["id"]} for image in content["images"]}
    for annotation in content["annotations"]:
        record = records.get(annotation.get("image_id"))
        if record is not None:
            item = {**annotation, "bbox_mode": BoxMode.XYWH_ABS}
            record.setdefault("annotations", []).append(item)
    return list(records.values())


def _select(
    content: dict[str, Any], records: list[dict], class_ids: dict[int, int] | None
) -> dict[str, Any] | None:
    """Keep only the loaded annotations of the content; None if it does not have all of them."""
    wanted: dict[Any, list[dict]] = {}
    for record in records:
        for annotation in record.get("annotations", []):
            key = _key(record["image_id"], annotation["category_id"], annotation.get("bbox"))
            wanted.setdefault(key, []).append(annotation)
    left = Counter({key: len(annotations) for key, annotations in wanted.items()})
    selected: list[dict[str, Any]] = []
    for annotation in content["annotations"]:
        category = annotation.get("category_id")
        if class_ids is not None:
            category = class_ids.get(category)
        key = _key(annotation.get("image_id"), category, annotation.get("bbox"))
        if left[key] > 0:
            loaded = wanted[key][-left[key]]
            left[key] -= 1
            selected.append(_complete(annotation, loaded, len(selected) + 1))
    if +left:
        return None
    images = {record["image_id"] for record in records}
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in images],
        "annotations": selected,
    }


def _key(image_id: Any, category: Any, box: Any) -> tuple:
    numbers = tuple(box.tolist() if isinstance(box, np.ndarray) else box) if box is not None else ()
    return image_id, category, str(numbers)


def _complete(annotation: dict[str, Any], loaded: dict[str, Any], number: int) -> dict[str, Any]:
    completed = {**annotation, "id": number, "iscrowd": int(bool(loaded.get("iscrowd", 0)))}
    completed.pop("ignore", None)  # pycocotools sets its own
    area = completed.get("area")
    if not isinstance(area, (int, float)) or not area > 0:
        shape = loaded.get("segmentation")
        completed["area"] = _area(shape, loaded, completed["bbox"])
    if "keypoints" in completed and completed.get("num_keypoints") is None:
        completed["num_keypoints"] = sum(v > 0 for v in completed["keypoints"][2::3])
    return completed


def _area(shape: Any, loaded: dict[str, Any], box: list[float]) -> float:
    if isinstance(shape, dict):
        return float(mask.area(shape))
    if shape:
        return float(sum(_polygon_area(np.reshape(polygon, (-1, 2))) for polygon in shape))
    return float(box[2] * box[3])


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return 0.5 * abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1)))


def _convert(records: list[dict], name: str) -> dict[str, Any]:
    """Convert the records to COCO's format with Detectron2."""
    records = copy.deepcopy(records)  # Detectron2 shifts keypoints in place
    for record in records:
        for annotation in record.get("annotations", []):
            annotation["iscrowd"] = int(bool(annotation.get("iscrowd", 0)))
    metadata = MetadataCatalog.get(name)
    kept = ("thing_classes", "thing_dataset_id_to_contiguous_id")
    with _scratch(), _quiet():
        DatasetCatalog.register(_SCRATCH, lambda: records)
        MetadataCatalog.get(_SCRATCH).set(
            **{key: getattr(metadata, key) for key in kept if hasattr(metadata, key)}
        )
        return convert_to_coco_dict(_SCRATCH)


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    try:
        yield
    finally:
        DatasetCatalog.pop(_SCRATCH, None)
        MetadataCatalog.pop(_SCRATCH, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Detectron2's log about loading a dataset, which repeats the one for the images."""
    theirs = logging.getLogger("detectron2")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)
