#!/usr/bin/env python3
"""Train and evaluate detectors on EfficientNet-Lite0: pisa_d2's train_net.py with this backbone."""

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import efficientnet_lite  # noqa: F401  (registers the backbone)

from pisa_d2 import train_net

if __name__ == "__main__":
    train_net.run()
