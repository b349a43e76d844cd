"""A reader of Pascal VOC's xml format, for any classes and the usual folders."""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from PIL import Image, ImageOps

# Names of the folders, in lower case, in Pascal VOC and from various tools. Without such a folder,
# the files are in the dataset's folder itself.
_ANNOTATION_FOLDERS = ("annotations", "annots", "xmls", "xml")
_IMAGE_FOLDERS = ("jpegimages", "images", "imgs", "img")


def load_voc(path: str | os.PathLike, classes: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """
    Load annotations in Pascal VOC's format. Like Detectron2, take coordinates for 1-based pixel
    indices, and subtract 1 from xmin and ymin.

    Args:
        path: a dataset's folder, or a file ``FOLDER/ImageSets/.../NAME.txt`` that lists some of its
            images. The folder has the xml files in "Annotations" and the images in "JPEGImages",
            or both in itself; images may have any suffix.
        classes: names of the classes; by default :func:`voc_classes` of the folder.

    Returns:
        One dict per image in Detectron2's format, sorted by image id in a folder and in the order
        of the list otherwise. Objects marked ``difficult`` carry ``"ignore": 1``.

    Raises:
        FileNotFoundError: there are no annotations, or a listed one is missing.
        ValueError: an annotation file cannot be parsed. The message names it.
    """
    names = voc_classes(path) if classes is None else list(classes)
    folder, listed = _resolve(path)
    images = _Images(folder, listed)
    class_ids = {name: i for i, name in enumerate(names)}
    return [_read_record(folder, image_id, images, class_ids) for image_id in listed]


def voc_classes(path: str | os.PathLike) -> list[str]:
    """
    Return the sorted class names in all annotations of a dataset's folder, not only of the images
    that ``path`` lists (see :func:`load_voc`), so that all splits have the same classes.
    """
    folder = _resolve(path)[0]
    names: set[str] = set()
    for image_id in _all_ids(folder):
        file = folder / f"{image_id}.xml"
        try:
            objects = _parse(file).findall("object")
        except ElementTree.ParseError as error:
            raise _not_voc(file, error) from error
        names.update(item.findtext("name", "").strip() for item in objects)
    return sorted(names)


def _resolve(path: str | os.PathLike) -> tuple[Path, list[str]]:
    """Find the folder of the xml files, and the ids to read: paths in it without the suffix."""
    path = Path(path)
    if path.is_dir():
        annotations = _subfolder(path, _ANNOTATION_FOLDERS)
        ids = _all_ids(annotations)
        if not ids:
            raise FileNotFoundError(
                f"'{annotations}' has no xml files. Name a folder that has Annotations/*.xml and "
                "JPEGImages/*, or both kinds of files in itself."
            )
        return annotations, ids
    if not path.is_file():
        raise FileNotFoundError(f"There is no folder and no list of images '{path}'.")
    roots = [parent.parent for parent in path.parents if parent.name.lower() == "imagesets"]
    if path.suffix.lower() != ".txt" or not roots:
        raise ValueError(
            f"'{path}' is neither the folder of a dataset in Pascal VOC's format nor a file "
            "ImageSets/Main/NAME.txt in one. A COCO json needs its image folder too: "
            "[name, annotation file, image folder]."
        )
    annotations = _subfolder(roots[0], _ANNOTATION_FOLDERS)
    ids = []
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())):
        # Pascal VOC's lists of a class have a second column; a file name may contain blanks.
        candidates = (line, line.split()[0])
        found = [i for i in candidates if (annotations / f"{i}.xml").is_file()]
        if not found:
            raise FileNotFoundError(
                f"'{path}' lists {line!r}, but '{annotations / line}.xml' is missing."
            )
        ids.append(found[0])
    return annotations, ids


def _subfolder(folder: Path, names: Sequence[str]) -> Path:
    found = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    return next((found[name] for name in names if name in found), folder)


def _all_ids(annotations: Path) -> list[str]:
    files = annotations.rglob("*.xml")
    return sorted(file.relative_to(annotations).with_suffix("").as_posix() for file in files)


class _Images:
    """The images of a dataset, by annotation file."""

    def __init__(self, annotations: Path, ids: Sequence[str]) -> None:
        beside = [annotations]
        if annotations.name.lower() in _ANNOTATION_FOLDERS:
            beside = [_subfolder(annotations.parent, _IMAGE_FOLDERS), annotations]
        for root in beside:
            self.root = root
            self._by_id: dict[str, list[Path]] = {}
            for file in _images_in(root):
                key = file.relative_to(root).with_suffix("").as_posix()
                self._by_id.setdefault(key, []).append(file)
            if any(image_id in self._by_id for image_id in ids):
                break
        else:
            self.root = beside[0]

    def find(self, image_id: str, name: str) -> Path:
        """
        Find the image of an annotation file.

        Args:
            image_id: path of the annotation file, relative and without its suffix.
            name: the name of the image in the annotation file; may be empty.

        Raises:
            ValueError: several images might be meant.
        """
        found = self._by_id.get(image_id, [])
        if len(found) == 1:
            return found[0]
        name = name.replace("\\", "/").rpartition("/")[2] or f"{image_id.rpartition('/')[2]}.jpg"
        named = (self.root / image_id).with_name(name)
        if found and named not in found:
            raise ValueError(f"several images belong to it: {', '.join(map(str, found))}")
        return named


def _images_in(root: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    return sorted(file for file in root.rglob("*") if file.suffix.lower() in suffixes)


def _parse(file: Path) -> ElementTree.Element:
    return ElementTree.parse(file).getroot()


def _not_voc(file: Path, reason: object) -> ValueError:
    return ValueError(f"'{file}' is not an annotation in Pascal VOC's format ({reason})")


def _read_record(
    annotations: Path, image_id: str, images: _Images, class_ids: dict[str, int]
) -> dict[str, Any]:
    file = annotations / f"{image_id}.xml"
    try:
        root = _parse(file)
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        image = images.find(image_id, root.findtext("filename", "").strip())
        width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
        if not width or not height:  # some tools leave it out, or write 0
            width, height = _read_size(image)
        return {
            "file_name": str(image),
            "image_id": image_id,
            "height": int(height),
            "width": int(width),
            "annotations": [_read_object(item, class_ids) for item in root.findall("object")],
        }
    except (ElementTree.ParseError, ValueError) as error:
        raise _not_voc(file, error) from error


def _number(element: ElementTree.Element, path: str) -> float:
    text = (element.findtext(path) or "0").strip()
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"its {path} is {text!r}, not a number") from None


def _read_size(image: Path) -> tuple[int, int]:
    with Image.open(image) as opened:
        return ImageOps.exif_transpose(opened).size


def _read_object(item: ElementTree.Element, class_ids: dict[str, int]) -> dict[str, Any]:
    name = item.findtext("name", "").strip()
    if name not in class_ids:
        raise ValueError(f"its class {name!r} is not one of {', '.join(class_ids)}")
    sides = ("xmin", "ymin", "xmax", "ymax")
    for side in sides:
        if item.find(f"bndbox/{side}") is None:
            raise ValueError(f"an object {name!r} has no bndbox/{side}")
    x1, y1, x2, y2 = (_number(item, f"bndbox/{side}") for side in sides)
    difficult = {"ignore": 1} if _number(item, "difficult") else {}
    box = [x1 - 1, y1 - 1, x2, y2]
    mode = BoxMode.XYXY_ABS
    return {"category_id": class_ids[name], "bbox": box, "bbox_mode": mode, **difficult}
