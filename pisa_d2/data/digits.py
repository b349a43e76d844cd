"""
``digits_train`` and ``digits_val``, a small detection dataset that needs no download, and
``digits_easy_train`` and ``digits_easy_val``, which a detector learns sooner.

The handwritten digits of scikit-learn (``load_digits``, 1797 scans of 8x8) are drawn in ink on
crops of its two photographs: at many sizes and partly over one another, or with ``easy`` fewer,
larger and in stronger ink. The splits share no scan and no part of a photograph: val gets every
fifth scan of a class and the right 240 of a photograph's 640 columns. A dataset is made on first
use, in seconds; ``python -m pisa_d2.data.digits`` makes ``digits`` in advance.

Photographs: china.jpg by danielbuechele, flower.jpg by vultilion, both CC BY 2.0.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets import load_coco_json
from PIL import Image
from tqdm import tqdm

from . import drawing
from .catalog import register_dataset

logger = logging.getLogger(__name__)

CLASSES = tuple("0123456789")
_SPLITS = {"train": slice(0, 400), "val": slice(400, 640)}  # columns of the photographs


def split_sources(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """
    Divide the scans so that no scan is in both splits and each class is in both.

    Args:
        labels: (1797,) class of each scan.

    Returns:
        For "train" and "val", the indices of their scans: four fifths and one fifth of each class.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    in_val = np.arange(len(order)) % 5 == 0
    return {"train": order[~in_val], "val": order[in_val]}


def _read_sources() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """
    Load scikit-learn's scans and photographs.

    Returns:
        (1797, 8, 8) scans, ink from 0 to 16; (1797,) their classes; the photographs, each
        (427, 640, 3) uint8.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_image
    except ImportError as error:
        raise ImportError(
            "Making the digits dataset needs scikit-learn: pip install scikit-learn"
        ) from error
    scans, labels = load_digits(return_X_y=True)
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return scans.reshape(-1, 8, 8), labels, photos


def _write_split(
    folder: Path, split: str, settings: dict[str, int], style: drawing.Style, progress: bool
) -> None:
    scans, labels, photos = _read_sources()
    sources = split_sources(labels, settings["seed"])[split]
    views = [Image.fromarray(photo[:, _SPLITS[split]]) for photo in photos]
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    image_ids = range(1, settings[f"num_{split}"] + 1)
    for image_id in tqdm(image_ids, desc=f"digits {split}", disable=not progress):
        # One generator per image: a larger dataset begins with the images of a smaller one.
        rng = np.random.default_rng((settings["seed"], list(_SPLITS).index(split), image_id))
        digits = drawing.place_digits(scans, sources, rng, style)
        background = drawing.crop_photo(views[rng.integers(len(views))], rng)
        file_name = f"{image_id:06d}.jpg"
        image = Image.fromarray(drawing.paint_digits(background, digits, rng, style))
        image.save(folder / split / file_name, quality=95)
        size = {"width": drawing.WIDTH, "height": drawing.HEIGHT}
        images.append({"id": image_id, "file_name": file_name, **size})
        owner = drawing.topmost(digits)
        for index, digit in enumerate(digits):
            x0, y0, x1, y1 = drawing.ink_box(owner == index)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(labels[digit.source]) + 1,  # COCO's begin with 1
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "source": digit.source,
                }
            )
    content = {
        "info": settings,
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    path = _json_file(folder, split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def _json_file(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def _build(folder: Path, settings: dict[str, int], style: drawing.Style, progress: bool) -> None:
    """Write everything into a folder next to ``folder``, then move it into place as a whole."""
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".digits-", dir=root)
    except OSError as error:
        raise OSError(
            f"Cannot make the digits dataset in '{root}' ({error}). Make this folder writable, or "
            "set the environment variable DETECTRON2_DATASETS to one that is."
        ) from error
    logger.info("Making the digits dataset in '%s' ...", folder)
    with scratch as name:
        made = Path(name) / folder.name
        for split in _SPLITS:
            _write_split(made, split, settings, style, progress)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # if it does, another process was faster
                raise


def make_digits(
    root: str | os.PathLike,
    num_train: int = 600,
    num_val: int = 150,
    seed: int = 0,
    max_digits: int | None = None,
    progress: bool = False,
    easy: bool = False,
) -> Path:
    """
    Make the dataset in ``<root>/digits`` or ``<root>/digits_easy``, unless it already exists. The
    same arguments give the same bytes, with the same versions of NumPy, Pillow and scikit-learn.
    The folder appears complete or not at all, even if several processes make it at once.

    Args:
        root: the folder of the datasets.
        num_train, num_val: number of images, at least 1.
        seed: seed of all random choices, at least 0.
        max_digits: the largest number of digits per image, at least 1; 9 by default, or 5 with
            ``easy``. With 1 or 2, most of an image is background.
        progress: whether to show a progress bar.
        easy: whether to draw fewer digits, larger, apart and in stronger ink.

    Returns:
        The folder, with ``train/*.jpg`` and ``val/*.jpg`` and, in COCO's format,
        ``annotations/instances_{train,val}.json``, where "source" is the index in ``load_digits``.

    Raises:
        ValueError: a number of images or digits is below 1, or the seed is negative.
        ImportError: scikit-learn is missing.
        FileExistsError: the folder exists and was made with different arguments.
        OSError: ``root`` cannot be written to.
    """
    style = drawing.EASY if easy else drawing.Style()
    if max_digits is not None:
        style = dataclasses.replace(style, max_digits=max_digits)
    settings = {
        "num_train": num_train,
        "num_val": num_val,
        "seed": seed,
        "max_digits": style.max_digits,
    }
    if num_train < 1 or num_val < 1 or seed < 0 or style.max_digits < 1:
        raise ValueError(
            f"Need num_train >= 1, num_val >= 1, seed >= 0 and max_digits >= 1, not {settings}."
        )
    folder = Path(root).expanduser() / _name(easy)
    if not folder.exists():
        _build(folder, settings, style, progress)
    try:
        found = json.loads(_json_file(folder, "val").read_text())["info"]
    except (OSError, ValueError, KeyError):
        found = "something else"
    if found != settings:
        raise FileExistsError(
            f"'{folder}' contains {found}, not {settings}. Remove it, or choose another root."
        )
    return folder


def _name(easy: bool) -> str:
    return "digits_easy" if easy else "digits"


def _load(root: Path, easy: bool, split: str) -> list[dict[str, Any]]:
    folder = root / _name(easy)
    if not folder.exists():  # a folder made in advance may have any number of images
        make_digits(root, easy=easy)
    name = f"{folder.name}_{split}"
    return load_coco_json(str(_json_file(folder, split)), str(folder / split), name)


def register_digits(root: str | os.PathLike, replace: bool = True) -> None:
    """
    Register ``digits_train`` and ``digits_val``, which are read from ``<root>/digits`` and made
    there when they are first loaded, and ``digits_easy_train`` and ``digits_easy_val`` likewise.
    Registered names are replaced, or kept with ``replace=False``.

    The first load makes the file that the metadata's ``json_file`` names and COCOEvaluator reads.
    That is early enough: ``DefaultTrainer.test`` builds its data loader before its evaluator.
    """
    root = Path(root).expanduser()
    for easy, split in itertools.product((False, True), _SPLITS):
        folder = root / _name(easy)
        register_dataset(
            f"{folder.name}_{split}",
            functools.partial(_load, root, easy, split),
            replace,
            thing_classes=list(CLASSES),
            evaluator_type="coco",
            json_file=str(_json_file(folder, split)),
            image_root=str(folder / split),
        )


def main() -> None:
    """Make the dataset that the command line describes."""
    parser = argparse.ArgumentParser(description="Make the digits dataset.")
    parser.add_argument(
        "--root",
        default=os.getenv("DETECTRON2_DATASETS", "datasets"),
        help="folder of the dataset, $DETECTRON2_DATASETS or 'datasets' by default",
    )
    parser.add_argument("--num-train", type=int, default=600, help="training images (%(default)s)")
    parser.add_argument("--num-val", type=int, default=150, help="validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s by default")
    parser.add_argument(
        "--max-digits",
        type=int,
        default=drawing.Style.max_digits,
        help="largest number per image (%(default)s); with 1 or 2, most of it is background",
    )
    args = parser.parse_args()
    folder = make_digits(
        args.root, args.num_train, args.num_val, args.seed, args.max_digits, progress=True
    )
    print(folder)


if __name__ == "__main__":
    main()
