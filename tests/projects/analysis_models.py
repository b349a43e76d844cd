"""A small detector and images as projects/SampleAnalysis/analyze_net.py looks at them."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers import random_batch, sampled_by, small_cfg
from torch import nn


def small_detector(*opts: object) -> tuple[CfgNode, nn.Module]:
    """With samplers that need predictions, in eval mode."""
    torch.manual_seed(0)
    cfg = small_cfg(*opts, *sampled_by("HardSampler", "HardSampler"))
    return cfg, build_model(cfg).eval()


def labelled_images(num_objects: list[int]) -> list[dict]:
    """Model inputs of these numbers of objects, as they come from a dataset."""
    batch = random_batch(num_objects)
    return [{**x, "image_id": i, "height": 96, "width": 128} for i, x in enumerate(batch)]
