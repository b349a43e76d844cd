"""SSD (https://arxiv.org/abs/1512.02325) for Detectron2, plain and with Prime Sample Attention."""

from .backbone import SSDVGG, build_ssd_vgg_backbone
from .config import add_ssd_config
from .convert import convert_torchvision
from .default_boxes import DefaultBoxes
from .mapper import SSDMapper
from .matcher import SSDMatcher
from .pisa_ssd import PISASSD
from .ssd import SSD

__all__ = [
    "PISASSD",
    "SSD",
    "SSDVGG",
    "DefaultBoxes",
    "SSDMapper",
    "SSDMatcher",
    "add_ssd_config",
    "build_ssd_vgg_backbone",
    "convert_torchvision",
]
