#!/usr/bin/env python3
"""Write a dataset with missing labels: with some removed, and with these as regions to ignore."""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

from pisa_d2.data.registered import register_builtin_datasets
from pisa_d2.evaluation import coco_truth


def hidden_ids(content: dict[str, Any], share: float, seed: int) -> set[int]:
    """
    Args:
        content: of a COCO json.
        share: of the annotations of each image, rounded to whole ones.
        seed: of the choice.

    Returns:
        The ids of the annotations that are hidden.
    """
    of_images: dict[Any, list[int]] = {}
    for annotation in content["annotations"]:
        of_images.setdefault(annotation["image_id"], []).append(annotation["id"])
    generator = random.Random(seed)
    return {i for ids in of_images.values() for i in generator.sample(ids, round(share * len(ids)))}


def hide(content: dict[str, Any], share: float, seed: int) -> dict[str, dict[str, Any]]:
    """
    Args:
        content, share, seed: see :func:`hidden_ids`.

    Returns:
        The contents of two: "removed" without the hidden annotations, and "regions", where they
        have ``ignore: 1``.
    """
    hidden = hidden_ids(content, share, seed)
    annotations = content["annotations"]
    return {
        "removed": {**content, "annotations": [a for a in annotations if a["id"] not in hidden]},
        "regions": {
            **content,
            "annotations": [{**a, "ignore": int(a["id"] in hidden)} for a in annotations],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="its registered name, such as bccd_trainval")
    parser.add_argument("--share", type=float, default=0.4, help="hidden (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(), help="folder (the current one)")
    args = parser.parse_args()
    if not 0 < args.share < 1:
        parser.error(f"--share {args.share:g} must be between 0 and 1.")
    register_builtin_datasets()
    content = coco_truth(args.dataset)
    folder = os.path.commonpath(
        [os.path.dirname(image["file_name"]) for image in content["images"]]
    )
    for image in content["images"]:
        image["file_name"] = os.path.relpath(image["file_name"], folder)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in hide(content, args.share, args.seed).items():
        path = args.output / f"{args.dataset}_{name}_{args.seed}.json"
        path.write_text(json.dumps(part))
        num_images, num_labels = len(part["images"]), len(part["annotations"])
        print(f"{path}: {num_images} images, {num_labels} annotations. Images: {folder or '.'}")


if __name__ == "__main__":
    main()
