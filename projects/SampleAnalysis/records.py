"""The images of a report."""

from detectron2.data import get_detection_dataset_dicts
from detectron2.structures import BoxMode

from pisa_d2.data.catalog import evenly


def load_records(dataset: str, num_images: int | None) -> list[dict]:
    """Load all images of the dataset, or that many, evenly from the whole of it."""
    records = get_detection_dataset_dicts([dataset], filter_empty=False)
    for record in records:
        for annotation in record.get("annotations", []):
            # Boxes suffice; outlines would take most of the memory.
            annotation.pop("segmentation", None)
    return evenly(records, num_images or len(records))


def num_objects(records: list[dict]) -> int:
    """Return the number of objects without crowds."""
    return sum(not a.get("iscrowd", 0) for r in records for a in r.get("annotations", []))


def easiest_to_read(records: list[dict]) -> int | str | None:
    """
    Return the image whose smallest object is the largest, of those with 2 to 5 objects; without
    any, the image with the fewest objects. None where no image has an object.
    """
    found: list[tuple[bool, float, int | str]] = []
    for record in records:
        items = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in items]
        few = 2 <= len(boxes) <= 5
        if boxes:
            area = min(width * height for _, _, width, height in boxes)
            size = area / (record["width"] * record["height"])
            found.append((few, size if few else -len(boxes), record["image_id"]))
    return max(found, key=lambda image: image[:2])[2] if found else None
