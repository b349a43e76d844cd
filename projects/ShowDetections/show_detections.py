#!/usr/bin/env python3
"""
Draw the detections of a trained detector next to the ground truth, and print its AP. Reads the
folder that a run of train_net.py wrote.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from pycocotools import mask

from pisa_d2.data import register_builtin_datasets, register_datasets
from pisa_d2.data.catalog import evenly
from pisa_d2.data.regions import with_regions_as_crowds
from pisa_d2.data.registered import check_registered
from pisa_d2.engine.metrics import COCO_METRICS, read_metrics
from pisa_d2.pictures import picture_names

IOU_THRESHOLD = 0.5  # as in AP50
# Ten colours that colour-blind people can distinguish (arXiv:2107.02270), each with a contrasting
# one for text and outlines.
COLORS = (
    ("#3f90da", "white"),
    ("#ffa90e", "black"),
    ("#bd1f01", "white"),
    ("#94a4a2", "black"),
    ("#832db6", "white"),
    ("#a96b59", "white"),
    ("#e76300", "black"),
    ("#b9ac70", "black"),
    ("#717581", "white"),
    ("#92dadb", "black"),
)


@dataclass
class Box:
    """A ground truth or a detection; ``xywh`` in pixels of the image, ``class_id`` contiguous."""

    xywh: list[float]
    class_id: int
    label: str
    crowd: bool = False
    matched: bool = False
    ignored: bool = False  # a detection in a crowd: neither right nor wrong


@dataclass
class Picture:
    path: str
    truth: list[Box]
    detections: list[Box]  # highest score first


def match(truth: list[Box], detections: list[Box]) -> None:
    """
    Set ``matched`` as COCO's evaluation does: each detection, highest score first, takes the free
    ground truth of its class that it overlaps most. A crowd is never used up and never missed.
    """
    for box in truth:
        box.matched = box.crowd
    if not truth or not detections:
        return
    crowd = [box.crowd for box in truth]
    overlaps = mask.iou([box.xywh for box in detections], [box.xywh for box in truth], crowd)
    for detection, ious in zip(detections, overlaps, strict=True):
        free = [
            (not box.crowd, iou, index)
            for index, (box, iou) in enumerate(zip(truth, ious, strict=True))
            if box.class_id == detection.class_id
            and iou >= IOU_THRESHOLD
            and (box.crowd or not box.matched)
        ]
        if free:
            own = truth[max(free)[-1]]
            detection.matched = own.matched = True
            detection.ignored = own.crowd


def read_config(output_dir: Path) -> CfgNode:
    """Return the config of the last evaluation, of the run or of --eval-only in its folder."""
    path = output_dir / "inference" / "config.yaml"
    if not path.is_file():
        path = output_dir / "config.yaml"
    if not output_dir.is_dir():
        raise FileNotFoundError(f"There is no folder '{output_dir}'.")
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing. Name a folder that train_net.py wrote.")
    # Read as it is: merging would refuse the keys of other projects.
    return CfgNode.load_yaml_with_base(str(path))


def read_test_sets(output_dir: Path) -> list[str]:
    """Return DATASETS.TEST of the last evaluation, after registering its DATASETS.REGISTER."""
    datasets = read_config(output_dir)["DATASETS"]
    if not datasets["TEST"]:
        raise ValueError(f"DATASETS.TEST of '{output_dir}' is empty: there is nothing to show.")
    register_builtin_datasets()
    register_datasets(datasets.get("REGISTER", []))
    return list(datasets["TEST"])


def ignores_regions(output_dir: Path) -> bool:
    """Return whether the run ignores its objects with ``ignore: 1``, like crowds."""
    model = read_config(output_dir).get("MODEL", {})
    return model.get("IGNORED_REGIONS", {}).get("ENABLED", False)


def load_pictures(output_dir: Path, num_images: int, min_score: float) -> list[Picture]:
    """
    Args:
        num_images: number of images, spaced evenly over the test dataset.
        min_score: detections that score less are left out.

    Raises:
        FileNotFoundError: a file of the run or of the dataset is missing.
        ValueError: the run's test dataset is not known.
    """
    name = read_test_sets(output_dir)[-1]  # each one's results overwrite those before
    path = output_dir / "inference" / "coco_instances_results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path}' is missing: no evaluation that saves its detections has finished (COCO and "
            "Pascal VOC evaluations do). Train to the end, or run train_net.py with --eval-only, "
            "this OUTPUT_DIR and --resume."
        )
    check_registered("DATASETS.TEST", [name])
    records = DatasetCatalog.get(name)
    all_results = json.loads(path.read_text())
    ids = {record["image_id"] for record in records}
    strangers = [result["image_id"] for result in all_results if result["image_id"] not in ids]
    if strangers:
        raise ValueError(
            f"'{path}' has detections for image {strangers[0]!r}, which {name!r} does not have: "
            "another dataset was evaluated. Run train_net.py with --eval-only again."
        )
    if ignores_regions(output_dir):
        records = with_regions_as_crowds(records)
    records = evenly(records, num_images)
    results: dict[Any, list[dict[str, Any]]] = {record["image_id"]: [] for record in records}
    for result in all_results:
        if result["image_id"] in results and result["score"] >= min_score:
            results[result["image_id"]].append(result)

    metadata = MetadataCatalog.get(name)  # complete only after the dataset was loaded
    names = metadata.thing_classes
    # COCOEvaluator writes the dataset's own ids if there is a mapping from them.
    class_ids = metadata.get("thing_dataset_id_to_contiguous_id", range(len(names)))
    pictures = []
    for record in records:
        truth = []
        for item in record.get("annotations", []):
            xywh = list(BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYWH_ABS))
            class_id, crowd = item["category_id"], bool(item.get("iscrowd", 0))
            truth.append(Box(xywh, class_id, names[class_id], crowd))
        detections = []
        for result in sorted(results[record["image_id"]], key=lambda result: -result["score"]):
            class_id = class_ids[result["category_id"]]
            label = f"{names[class_id]} {result['score']:.2f}"
            detections.append(Box(result["bbox"], class_id, label))
        match(truth, detections)
        pictures.append(Picture(record["file_name"], truth, detections))
    return pictures


def last_metrics(output_dir: Path) -> dict[str, float] | None:
    """Return the box AP of the last evaluation in training, in percent; None if there was none."""
    names = read_test_sets(output_dir)
    prefix = "bbox/" if len(names) == 1 else f"{names[-1]}/bbox/"
    try:
        lines = read_metrics(output_dir)
    except FileNotFoundError:
        return None
    evaluations = [line for line in lines if f"{prefix}AP" in line]
    if not evaluations:
        return None
    return {
        name: evaluations[-1][prefix + name]
        for name in COCO_METRICS
        if prefix + name in evaluations[-1]
    }


def draw(pictures: list[Picture], path: Path, panel_width: float) -> None:
    """
    Write a PNG file: ground truth and detections side by side, at most two pictures in a row.

    Args:
        panel_width: of one image, in hundreds of pixels; small images are enlarged.
    """
    images = [read_image(picture.path, "RGB") for picture in pictures]
    columns = min(len(pictures), 2)
    rows = math.ceil(len(pictures) / columns)
    panel_height = panel_width * min(max(i.shape[0] / i.shape[1] for i in images), 1)
    size = (2 * columns * panel_width, rows * (panel_height + 0.3))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for index, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        for axes, boxes, title, flaw in (
            (panels[2 * index], picture.truth, "ground truth", "missed"),
            (panels[2 * index + 1], picture.detections, "detections", "wrong"),
        ):
            flawed = sum(not box.matched for box in boxes)
            hatched = sum(box.crowd or box.ignored for box in boxes)
            ignored = f", ignored (hatched): {hatched}" if hatched else ""
            axes.set_title(f"{title}: {len(boxes)}, {flaw} (dashed): {flawed}{ignored}")
            _draw_boxes(axes, image, boxes)
    figure.savefig(path)


def _draw_boxes(axes: Axes, image: np.ndarray, boxes: list[Box]) -> None:
    axes.imshow(image)
    for box in boxes:
        x, y, w, h = box.xywh
        color, contrast = COLORS[box.class_id % len(COLORS)]
        width, style = (1.5, "-") if box.matched else (3, "--")
        hatch = "//" if box.crowd or box.ignored else None
        frame = Rectangle((x, y), w, h, fill=False, ec=color, lw=width, ls=style, hatch=hatch)
        frame.set_path_effects([withStroke(linewidth=width + 1.5, foreground=contrast)])
        axes.add_patch(frame)
        # Labels stay inside the image: below the upper edge, to the left of the right one.
        at_right = x > 0.85 * image.shape[1]
        axes.text(
            min(x + w, image.shape[1]) if at_right else max(x, 0),
            max(y, 0),
            box.label,
            parse_math=False,
            color=contrast,
            fontsize=9,
            ha="right" if at_right else "left",
            va="top" if y < 0.04 * image.shape[0] else "bottom",
            bbox={"fc": color, "ec": "none", "pad": 1},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of a run of train_net.py")
    parser.add_argument("--num-images", type=int, default=6, help="%(default)s by default")
    parser.add_argument("--min-score", type=float, default=0.5, help="%(default)s by default")
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error("--num-images must be at least 1")
    try:
        pictures = load_pictures(args.output_dir, args.num_images, args.min_score)
        metrics = last_metrics(args.output_dir)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")

    folder = args.output_dir / "detections"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    names = picture_names([picture.path for picture in pictures])
    for name, picture in zip(names, pictures, strict=True):
        draw([picture], folder / f"{name}.png", panel_width=8)
    draw(pictures, args.output_dir / "detections.png", panel_width=5)
    print(f"Ground truth and detections: {args.output_dir / 'detections.png'}")
    if metrics:
        print("Box AP in percent:")
        print("".join(f"{key:>7}" for key in metrics))
        print("".join(f"{value:7.1f}" for value in metrics.values()))
    print(args.output_dir)


if __name__ == "__main__":
    main()
