"""Checks of the images of a dataset by their headers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .image_headers import Header, Outcome, read_headers
from .messages import Warn, named


@dataclass(frozen=True)
class Reading:
    """
    Settings by which a model's images are read.

    Attributes:
        image_format: ``INPUT.FORMAT``.
        max_size: the longer edge after resizing, in pixels; 0 if images are not resized.
        skips_damaged: whether to leave out damaged images instead of refusing them.
    """

    image_format: str = "BGR"
    max_size: int = 0
    skips_damaged: bool = False


# Values of INPUT.FORMAT for which Detectron2 converts images to 8 bits.
_EIGHT_BIT = ("BGR", "RGB", "L", "YUV-BT.601")


def _missing(name: str, files: list[str], total: int) -> FileNotFoundError:
    hints = []
    if any("\\" in file for file in files):
        hints.append("Write '/' instead of '\\' in their names.")
    for file in files[:1]:
        path = Path(file)
        if not path.parent.is_dir():
            hints.append(f"There is no folder '{path.parent}'.")
            continue
        similar = [p.name for p in path.parent.iterdir() if p.stem.lower() == path.stem.lower()]
        hints += [f"The folder has '{other}' instead." for other in similar[:1]]
    quoted = [f"'{file}'" for file in files]
    return FileNotFoundError(
        f"Dataset '{name}': {len(files)} of its {total} images are missing: {named(quoted)}. "
        + "".join(f"{hint} " for hint in hints)
        + "Put them there, correct the names or the image folder, or set the environment variable "
        "DETECTRON2_DATASETS to the folder of the datasets."
    )


def _size_fault(record: dict, header: Header) -> str | None:
    given = record.get("width", header.width), record.get("height", header.height)
    if given == (header.width, header.height):
        return None
    text = f"'{record['file_name']}' is {header.width} x {header.height}"
    if header.turned:
        text += " once rotated by its EXIF tag, as Detectron2 does"
    return f"{text}, but its annotations say {given[0]} x {given[1]}"


def _depth_fault(header: Header) -> str | None:
    if header.low < 0 or header.high > 255 or (header.mode == "F" and header.high <= 1):
        return f"of mode {header.mode} with values from {header.low:g} to {header.high:g}"
    return None


# The fault of images and the fix, by kind.
_ADVICE = {
    "unreadable": "cannot be opened: {files}. Check the permissions and the disk",
    "damaged": "are damaged or of an unknown format: {files}. Copy or download them again, convert "
    "them to JPEG or PNG, or remove them from the annotations",
    "large": "have more pixels than Pillow loads: {files}. Divide or shrink them, with their boxes",
    "thin": "are so thin that resizing leaves nothing of the shorter edge: {files}. Divide them, "
    "or remove them from the annotations",
    "size": "differ in size from their annotations: {files}. Correct width and height, and check "
    "that the boxes fit the image",
    "turned": "differ in size from their annotations: {files}. If the boxes fit the image without "
    "this rotation, remove the tag: exiftool -Orientation= FILE; otherwise correct width "
    "and height",
    "deep": "have more than 8 bits per channel, and values outside 0 to 255 would be cut off: "
    "{files}. Convert all images in the same way, by the range of the whole dataset: python -c "
    "\"import numpy, PIL.Image as I; a = numpy.asarray(I.open('OLD')); I.fromarray(((a - {low:g}) "
    "* (255 / {span:g})).astype('uint8')).save('NEW.png')\"",
}


def _faults(record: dict, outcome: Outcome, reading: Reading) -> Iterator[tuple[str, str]]:
    """Yield pairs of a kind of :data:`_ADVICE` and the file with its fault."""
    file = f"'{record['file_name']}'"
    if isinstance(outcome, Image.DecompressionBombError):
        yield "large", f"{file} ({outcome})"
    elif isinstance(outcome, Exception):
        system = isinstance(outcome, OSError) and outcome.errno is not None
        yield "unreadable" if system else "damaged", f"{file} ({outcome})"
    else:
        if (fault := _size_fault(record, outcome)) is not None:
            yield "turned" if outcome.turned else "size", fault
        if reading.image_format in _EIGHT_BIT and (fault := _depth_fault(outcome)) is not None:
            yield "deep", f"{file} {fault}"
        shorter, longer = sorted((outcome.width, outcome.height))
        if 0 < 2 * shorter * reading.max_size < longer:
            yield "thin", f"{file} ({outcome.width} x {outcome.height})"


def check_images(dicts: list[dict], name: str, reading: Reading, warn: Warn) -> list[dict]:
    """
    Check that images exist, can be read, and agree with their annotations, without decoding them.
    Images at addresses with "://" are not checked.

    Args:
        dicts: one dict per image, in Detectron2's format.
        name: the name of the dataset.
        reading: the settings by which the images are read.
        warn: called with each warning.

    Returns:
        The dataset, without damaged images if ``reading`` allows that.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: images cannot be used. Both errors name the first files and the fix.
    """
    local = [r for r in dicts if "file_name" in r and "://" not in str(r["file_name"])]
    outcomes = read_headers([str(record["file_name"]) for record in local], name)
    missing = [n for n, o in outcomes.items() if isinstance(o, FileNotFoundError)]
    if missing:
        raise _missing(name, missing, len(dicts))
    found: dict[str, list[str]] = {}
    damaged = set()
    for record in local:
        for kind, text in _faults(record, outcomes[str(record["file_name"])], reading):
            found.setdefault(kind, []).append(text)
            if kind == "damaged":
                damaged.add(str(record["file_name"]))
    if damaged and reading.skips_damaged and len(found["damaged"]) < len(dicts):
        files = found.pop("damaged")
        advice = _ADVICE["damaged"].format(files=named(files))
        warn(f"{len(files)} of {len(dicts)} images are left out, since they {advice}.")
        dicts = [record for record in dicts if str(record.get("file_name")) not in damaged]
    if found:
        deep = [o for o in outcomes.values() if isinstance(o, Header) and _depth_fault(o)]
        low = min((header.low for header in deep), default=0)
        span = max((header.high for header in deep), default=255) - low or 1
        texts = [
            f"{len(files)} of {len(dicts)} images "
            + _ADVICE[kind].format(files=named(files), low=low, span=span)
            for kind, files in found.items()
        ]
        raise ValueError(f"Dataset '{name}': {'. '.join(texts)}.")
    return dicts
