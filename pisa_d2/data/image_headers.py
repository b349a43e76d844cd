"""Reading of sizes and pixel formats of images without decoding, with a cache on disk."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation
from PIL import Image
from tqdm import tqdm

logger = logging.getLogger(__name__)

_EXIF_ORIENTATION = 274
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
_DEEP = ("I", "F")  # first letters of modes with more than 8 bits per channel
_THREADS = 8  # they mostly wait for a disk or a network
_WORTH_SAYING = 10_000  # from this number of images on, reading headers takes seconds
_CACHE_VERSION = 1


class Header(NamedTuple):
    """
    The header of an image.

    Attributes:
        width, height: in pixels, after Detectron2 applies the EXIF orientation.
        turned: whether the orientation swaps width and height.
        mode: Pillow's mode.
        low, high: the range of values if there are more than 8 bits per channel, otherwise 0, 255.
    """

    width: int
    height: int
    turned: bool
    mode: str
    low: float
    high: float


Outcome = Header | Exception


def _is_complete(file: BinaryIO, image_format: str | None) -> bool:
    """Return whether the end of the file shows that nothing is missing."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    try:
        if image_format == "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size
        end = _LAST_BYTES.get(image_format or "")
        file.seek(max(0, size - 16))
        return end is not None and file.read().endswith(end)
    finally:
        file.seek(position)


def read_header(path: str) -> Header:
    """
    Read the header of an image. The image is decoded only if the header does not suffice: if the
    end looks incomplete, for the values of 16-bit and float images, and for rotated TIFFs.

    Raises:
        OSError, SyntaxError, ValueError: the file is missing, damaged or not an image.
        PIL.Image.DecompressionBombError: it has more pixels than Pillow loads.
    """
    with open(path, "rb") as file, Image.open(file) as image:
        complete = _is_complete(file, image.format)
        try:
            # The method of a PNG would decode the image to find EXIF at its end.
            orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
        except Exception:  # Detectron2 does not rotate such an image
            orientation = 1
        width, height = image.size
        turned = orientation in _TURNED
        if turned and image.format == "TIFF":  # Pillow itself rotates some
            width, height = _apply_exif_orientation(image).size
        elif turned:
            width, height = height, width
        if not complete:
            image.load()
        low, high = np.array(image.getextrema() if image.mode[0] in _DEEP else (0, 255)).tolist()
        return Header(width, height, turned, image.mode, low, high)


def _try_to_read(path: str) -> Outcome:
    try:
        return read_header(path)
    except Exception as error:  # decoders raise errors of many kinds
        return error


def _stamp(path: str) -> list[int] | OSError:
    try:
        status = os.stat(path)
    except OSError as error:
        return error
    return [status.st_size, status.st_mtime_ns]


def cache_folder() -> Path:
    """Return the folder of the remembered headers, which may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pisa_d2"


def _cache_file(paths: Sequence[str]) -> Path:
    folders = "\n".join(sorted({os.path.dirname(path) for path in paths}))
    name = hashlib.sha256(folders.encode(errors="surrogateescape")).hexdigest()[:24]
    return cache_folder() / f"images_{name}.json"


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """
    Let other processes wait, for example in a training on several GPUs, so that only the first one
    reads the images.
    """
    with contextlib.ExitStack() as stack:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(cache.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("Image headers are not remembered: %s.", error)
        yield


def _load(cache: Path) -> dict[str, list]:
    try:
        content = json.loads(cache.read_bytes())
        return content["images"] if content["version"] == _CACHE_VERSION else {}
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
        return {}


def _save(cache: Path, known: dict[str, list]) -> None:
    unfinished = cache.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # _locked has mentioned it
        unfinished.write_text(json.dumps({"version": _CACHE_VERSION, "images": known}))
        unfinished.replace(cache)


def read_headers(paths: Sequence[str], name: str) -> dict[str, Outcome]:
    """
    Read the headers of images. A remembered header is used if the file has the same size and time
    of change. Headers that could be read are remembered in :func:`cache_folder`, even if reading is
    interrupted.

    Args:
        paths: the paths of local files.
        name: the name of the dataset, for the progress bar.

    Returns:
        For each path its header, or the error from reading it.
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    cache = _cache_file(list(absolute.values()))
    outcomes: dict[str, Outcome] = {}
    with _locked(cache), ThreadPool(_THREADS) as pool:
        known = _load(cache)
        stamps = pool.map(_stamp, absolute, chunksize=256)
        unread = {}
        for (path, key), stamp in zip(absolute.items(), stamps, strict=True):
            if isinstance(stamp, OSError):
                outcomes[path] = stamp
            elif (entry := known.get(key)) and entry[:2] == stamp:
                outcomes[path] = Header(*entry[2:])
            else:
                unread[path] = stamp
        if not unread:
            return outcomes
        if len(unread) > _WORTH_SAYING:
            logger.info("Reading the headers of %d images of '%s'.", len(unread), name)
        read = pool.imap(_try_to_read, unread, chunksize=16)
        # No bar in a log file, or for less than a second.
        progress = tqdm(read, name, len(unread), leave=False, delay=1, disable=None)
        try:
            for (path, stamp), outcome in zip(unread.items(), progress, strict=True):
                outcomes[path] = outcome
                if isinstance(outcome, Header):
                    known[absolute[path]] = [*stamp, *outcome]
        finally:
            _save(cache, known)
    return outcomes
