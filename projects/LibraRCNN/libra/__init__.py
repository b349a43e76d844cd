"""The balanced feature pyramid of Libra R-CNN (https://arxiv.org/abs/1904.02701)."""

from .balanced_pyramid import BalancedFeaturePyramid, build_libra_backbone
from .config import add_libra_config
from .non_local import NonLocalBlock, non_local

__all__ = [
    "BalancedFeaturePyramid",
    "NonLocalBlock",
    "add_libra_config",
    "build_libra_backbone",
    "non_local",
]
