"""
Recognition of annotation files that are not in COCO's format, so that an error can say how to
proceed instead of which key is missing.
"""

import json
import re
from typing import Any

from detectron2.utils.file_io import PathManager

_HEAD_BYTES = 2**16  # enough to recognise a text format
_MAGIC = {
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"\xef\xbb\xbf": "JSON with a byte order mark: save it as UTF-8 without one",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer: get its content with 'git lfs pull'",
}
_EXPORT = "export it in COCO's format, or convert it"
# The first pattern that matches the beginning of the text, without blanks before it.
_TEXTS = {
    r"<!doctype html|<html": "a web page, as saved by a failed download: download it again",
    r"(<\?xml[^>]*>\s*)?<annotations>": f"CVAT's XML: {_EXPORT}",
    r"(<\?xml[^>]*>\s*)?<annotation\b": f"Pascal VOC's XML of one image: {_EXPORT}",
    r"<": f"XML: {_EXPORT}",
    r"\d+([ \t]+-?\d*\.?\d+(e-?\d+)?){4,}\s*(\n|$)": f"YOLO's text of one image: {_EXPORT}",
    r"(#.*\n|\s)*(path|train|val|nc|names):": f"YOLO's description of a dataset: {_EXPORT}",
    r"[^\n{\[]*\b(filename|image_?id|image_path|xmin|class)\b[^\n]*,": f"a CSV table: {_EXPORT}",
    r"[{\[]\s*'": "Python's notation, with single quotes: write it with json.dump",
}
# The keys of a list's first entry, and the format of the list.
_LISTS = [
    ({"image_id", "category_id", "score"}, "COCO's results, which are detections"),
    ({"image_id", "category_id"}, "a list of annotations without their images and categories"),
    ({"file_name", "annotations"}, "a list of Detectron2's dataset dicts: register a function"),
    ({"image", "annotations"}, f"CreateML's format: {_EXPORT}"),
    ({"imagefilename"}, f"CreateML's format: {_EXPORT}"),
    ({"data", "annotations"}, f"Label Studio's format: {_EXPORT}"),
    ({"data", "predictions"}, f"Label Studio's format: {_EXPORT}"),
    ({"name", "labels"}, f"Scalabel's (BDD100K's) format: {_EXPORT}"),
    ({"Labeled Data"}, f"Labelbox's format: {_EXPORT}"),
    ({"data_row"}, f"Labelbox's format: {_EXPORT}"),
    ({"filename", "regions"}, f"VIA's format: {_EXPORT}"),
]
# The keys of an object, and its format.
_OBJECTS = [
    ({"_via_img_metadata"}, f"a VIA project: {_EXPORT}"),
    ({"shapes", "imagePath"}, f"labelme's format of one image: {_EXPORT}"),
    ({"assets", "tags"}, f"VoTT's format: {_EXPORT}"),
    ({"items", "categories"}, f"Datumaro's format: {_EXPORT}"),
    ({"objects", "size"}, f"Supervisely's format of one image: {_EXPORT}"),
    ({"openlabel"}, f"OpenLABEL's format: {_EXPORT}"),
    ({"frames"}, f"Scalabel's (BDD100K's) format: {_EXPORT}"),
    ({"data_row"}, f"Labelbox's format: {_EXPORT}"),
]
_ANNOTATIONS = [
    ({"caption"}, "COCO's captions, without boxes: use the instances file"),
    ({"segments_info"}, "COCO's panoptic format: use the instances file"),
]


def _match(table: list[tuple[set[str], str]], entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return None
    return next((name for keys, name in table if keys <= entry.keys()), None)


def format_of_json(content: Any) -> str | None:
    """Name the format of parsed JSON that is not COCO's instances; None if it is unknown."""
    if isinstance(content, list):
        return _match(_LISTS, content[0]) if content else "an empty list"
    if not isinstance(content, dict):
        return None
    if not content:
        return "an empty object"
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if all(isinstance(v, dict) and {"filename", "regions"} <= v.keys() for v in content.values()):
        return f"VIA's format: {_EXPORT}"
    return _match(_OBJECTS, content) or _match(_ANNOTATIONS, first)


def _format_of_text(head: bytes) -> str | None:
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    text = head.decode(errors="replace").lstrip()
    if not text:
        return "empty: copy or download it again"
    for pattern, name in _TEXTS.items():
        if re.match(pattern, text, re.IGNORECASE):
            return name
    return None


def _describe_json_error(error: json.JSONDecodeError) -> str:
    text = error.doc.rstrip()
    if error.pos >= len(text) or not text.endswith(("}", "]")):
        return "is incomplete JSON: copy or download it again"
    if error.msg == "Extra data" and text[: error.pos].count("\n") == 1:
        return f"is JSON Lines, one object per line: {_EXPORT}"
    near = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return (
        f"is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}, near "
        f"{near!r}. Correct it there, or write it with json.dump"
    )


def describe_unreadable(path: str) -> str | None:
    """
    Explain why a file cannot be read as COCO's json, for example "is Pascal VOC's XML of one image:
    ..."; None if the reason is unknown.
    """
    with PathManager.open(path, "rb") as file:
        data = file.read()
    named = _format_of_text(data[:_HEAD_BYTES])
    if named is not None:
        return f"is {named}"
    try:
        named = format_of_json(json.loads(data))
    except json.JSONDecodeError as error:
        return _describe_json_error(error)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text (byte {error.start}): save it as UTF-8"
    return f"is {named}" if named else None


def lists_annotations(path: str) -> bool:
    """Return whether a COCO json has a list of annotations, empty or not."""
    with PathManager.open(path, "rb") as file:
        return "annotations" in json.load(file)
