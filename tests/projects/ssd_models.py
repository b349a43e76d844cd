"""Small models, ground truths and predictions for the tests of SSD."""

import pisa_d2  # isort: skip  (before detectron2: it patches 0.6)

import ssd
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import ROOT, random_boxes

PROJECT = ROOT / "projects" / "SSD"
CONFIGS = PROJECT / "configs"

PLAIN, PISA = "COCO-Detection/ssd300_vgg16.yaml", "COCO-Detection/pisa_ssd300_vgg16.yaml"
NUM_CLASSES = 5
OFF = ["MODEL.PISA.ISR_P.ENABLED", False, "MODEL.PISA.CARL.ENABLED", False]


def load(name, *opts):
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    ssd.add_ssd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.SSD.NUM_CLASSES", NUM_CLASSES, *opts])
    return cfg


def small(name, *opts):
    torch.manual_seed(0)
    return build_model(load(name, *("MODEL.SSD.WIDTH", 0.05), *opts))


def random_targets(num_objects, num_boxes=60, seed=0):
    """Default boxes (R, 4) and ground truths of images, each with a near copy among the former."""
    generator = torch.Generator().manual_seed(seed)
    images, boxes = [], random_boxes(num_boxes, generator)
    for num in num_objects:
        image = Instances((300, 300))
        near = torch.randperm(num_boxes, generator=generator)[:num]
        image.gt_boxes = Boxes(boxes[near] + 8 * torch.rand(num, 4, generator=generator) - 4)
        image.gt_classes = torch.randint(NUM_CLASSES, (num,), generator=generator)
        images.append(image)
    return boxes, images


def random_predictions(num_images, num_boxes=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_images, num_boxes, NUM_CLASSES + 1, generator=generator)
    deltas = torch.randn(num_images, num_boxes, 4, generator=generator)
    return logits.requires_grad_(), deltas.requires_grad_()
