#!/usr/bin/env python3
"""Cut validation data off the training images of a COCO json, at random."""

import argparse
import json
import random
from pathlib import Path
from typing import Any


def hold_out(content: dict[str, Any], fraction: float, seed: int) -> list[dict[str, Any]]:
    """
    Args:
        content: of a COCO json.
        fraction: of its images that are held out.
        seed: of the choice.

    Returns:
        The contents of two: what is left, and what is held out.
    """
    ids = sorted(image["id"] for image in content["images"])
    held = set(random.Random(seed).sample(ids, round(fraction * len(ids))))

    def part(inside: bool) -> dict[str, Any]:
        return {
            **content,
            "images": [image for image in content["images"] if (image["id"] in held) == inside],
            "annotations": [a for a in content["annotations"] if (a["image_id"] in held) == inside],
        }

    return [part(False), part(True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="COCO json of the training images")
    parser.add_argument("--fraction", type=float, default=0.2, help="held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(), help="folder (the current one)")
    args = parser.parse_args()
    if not 0 < args.fraction < 1:
        parser.error(f"--fraction {args.fraction:g} must be between 0 and 1.")
    args.output.mkdir(parents=True, exist_ok=True)
    parts = hold_out(json.loads(args.json.read_text()), args.fraction, args.seed)
    for name, content in zip(("fit", "held_out"), parts, strict=True):
        path = args.output / f"{args.json.stem}_{name}.json"
        path.write_text(json.dumps(content))
        print(f"{path}: {len(content['images'])} images")


if __name__ == "__main__":
    main()
