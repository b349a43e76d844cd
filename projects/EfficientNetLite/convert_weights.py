#!/usr/bin/env python3
"""Write the ImageNet weights of EfficientNet-Lite0 as a file for MODEL.WEIGHTS."""

import argparse
import pickle
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import torch
from efficientnet_lite import convert_weights, find_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="a .pkl file")
    parser.add_argument(
        "--file", type=Path, help="weights file; by default, of the installed package"
    )
    args = parser.parse_args()
    if args.output.suffix != ".pkl":
        parser.error(f"'{args.output}' must end in .pkl: only such files load under any prefix")
    state_dict = torch.load(args.file or find_weights(), map_location="cpu", weights_only=True)
    weights = {key: value.numpy() for key, value in convert_weights(state_dict).items()}
    # Detectron2 then finds a tensor's place by the end of its name: in a pyramid or without one.
    content = {"model": weights, "__author__": "EfficientNet-Lite0", "matching_heuristics": True}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(pickle.dumps(content))
    print(f"{len(weights)} tensors in {args.output}")


if __name__ == "__main__":
    main()
