"""Configs, small models and made-up pyramids for the tests of Libra R-CNN."""

import pisa_d2  # isort: skip  (before detectron2: it patches 0.6)

import libra
import torch
from detectron2.config import get_cfg
from detectron2.modeling import Backbone, build_model
from helpers import ROOT, THIN_RESNET
from torch import nn

PROJECT = ROOT / "projects" / "LibraRCNN"
CONFIGS = PROJECT / "configs"

RCNN = "BCCD/libra_faster_rcnn_R_18_FPN.yaml"
RETINANET = "COCO-Detection/libra_retinanet_R_50_FPN_1x.yaml"


def new_cfg():
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    libra.add_libra_config(cfg)
    return cfg


def load(name, *opts):
    cfg = new_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


SMALL = [
    *("MODEL.WEIGHTS", "", *THIN_RESNET),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
]
# Overrides that make the RetinaNet for COCO as small as the model for BCCD.
SMALL_RETINANET = [
    *("MODEL.FPN.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 1),
]


def small(name, *opts):
    """A model that takes a training step in a tenth of a second."""
    torch.manual_seed(0)
    retinanet = SMALL_RETINANET if "retinanet" in name else []
    return build_model(load(name, *SMALL, *retinanet, *opts))


class Maps(Backbone):
    """A pyramid whose levels are parameters, whatever the image."""

    def __init__(self, sizes, channels=3, num_images=2, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(num_images, channels, *size) for size in sizes]
        maps = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.maps = nn.ParameterList(maps)
        self._out_features = [f"p{i + 2}" for i in range(len(sizes))]
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)
        self._out_feature_strides = {f"p{i + 2}": 2 ** (i + 2) for i in range(len(sizes))}

    def forward(self, x):
        return dict(zip(self._out_features, self.maps, strict=True))


class Constrained(Maps):
    """Features named from coarse to fine, and every property that a backbone may have."""

    size_divisibility = 64
    padding_constraints = {"square_size": 1024}

    def output_shape(self):
        return dict(reversed(super().output_shape().items()))
