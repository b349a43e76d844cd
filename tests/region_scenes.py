"""Regions to ignore for images of the tests, and a slow search for the boxes inside them."""

import numpy as np
import torch
from detectron2.modeling import build_model
from helpers import IMAGE_SIZE, random_batch, random_boxes, small_cfg
from oracles import slow_inside, slow_iou

HEIGHT, WIDTH = IMAGE_SIZE
WHOLE = [0, 0, WIDTH, HEIGHT]
# Regions for an image with the objects of random_batch([3]).
SCENES = {
    "none": [],
    "whole image": [WHOLE],
    "no area": [[20, 10, 20, 90], [30, 30, 30, 30]],
    "overlapping": [[0, 0, 70, 60], [40, 20, 128, 80]],
    "over the objects": [box.tolist() for box in random_batch([3])[0]["instances"].gt_boxes.tensor],
}


def build(*opts, cfg=small_cfg):
    torch.manual_seed(0)
    return build_model(cfg(*opts)).train()


def candidates(targets, seed=0):
    """Make boxes near the objects and anywhere, and one without area in the middle."""
    generator = torch.Generator().manual_seed(seed)
    near = targets.gt_boxes.tensor.repeat(20, 1)
    near = near + 12 * torch.rand(near.shape, generator=generator) - 6
    middle = torch.tensor([[60.0, 40, 60, 40]])
    return torch.cat([near, random_boxes(60, generator), middle])


def slow_classes(boxes, targets, regions, num_classes, threshold=0.5):
    """Label one proposal after the other by the object of highest IoU and by the regions."""
    objects = targets.gt_boxes.tensor.tolist()
    classes = []
    for box, inside in zip(boxes, slow_inside(boxes, regions, 0.5), strict=True):
        ious = [slow_iou(box, own, np.float32) for own in objects]
        if ious and max(ious) >= threshold:
            classes.append(int(targets.gt_classes[ious.index(max(ious))]))
        else:
            classes.append(-1 if inside else num_classes)
    return classes
