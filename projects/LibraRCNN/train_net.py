#!/usr/bin/env python3
"""Train and evaluate Libra R-CNN: pisa_d2's train_net.py with its pyramid and keys."""

import argparse
from typing import Any

import pisa_d2  # isort: skip  (before detectron2: it patches 0.6)

from detectron2.config import CfgNode
from libra import add_libra_config

from pisa_d2 import train_net


def add_config(cfg: CfgNode) -> None:
    pisa_d2.add_pisa_config(cfg)
    add_libra_config(cfg)


def main(args: argparse.Namespace) -> Any:
    return train_net.main(args, add_config=add_config)


if __name__ == "__main__":
    train_net.run(main, add_config)
