"""Models and images for the scripts of this folder."""

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import cast

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNN, build_model

from pisa_d2.config import read_config
from pisa_d2.data import KeepRegions, register_from_config
from pisa_d2.data.classes import take_num_classes
from pisa_d2.data.registered import check_registered
from pisa_d2.roi_heads import PISAMixin
from pisa_d2.samplers import BatchSampler, build_batch_sampler

# Raised by Detectron2 0.6's anchors; users cannot act on it.
warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)

PISA_HEADS = {
    "StandardROIHeads": "PISAROIHeads",
    "Res5ROIHeads": "PISARes5ROIHeads",
    "CascadeROIHeads": "PISACascadeROIHeads",
}
# Samplers of the positives and of the negatives.
STRATEGIES = {
    "random": ("RandomSampler", "RandomSampler"),
    "IoU-balanced": ("InstanceBalancedSampler", "IoUBalancedSampler"),
    "hard": ("HardSampler", "HardSampler"),
    "prime": ("IoUHLRSampler", "ScoreHLRSampler"),
}
OVERLAP = 0.05  # IoU above which a negative is more than background


def setup(config_file: str, options: list[str]) -> CfgNode:
    """Read the config, with the heads of this package instead of Detectron2's."""
    cfg = read_config(config_file)
    cfg.merge_from_list(options)
    register_from_config(cfg)
    take_num_classes(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NAME = PISA_HEADS.get(cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NAME)
    return cfg


def dataset_of(cfg: CfgNode, name: str | None = None) -> str:
    """
    Return ``name``, or the first of ``DATASETS.TEST``.

    Raises:
        SystemExit: it is not registered, or ``DATASETS.TEST`` is empty.
    """
    key, names = ("--dataset", [name]) if name else ("DATASETS.TEST", cfg.DATASETS.TEST[:1])
    if not names:
        sys.exit("DATASETS.TEST is empty: name a dataset.")
    try:
        check_registered(key, names)
    except ValueError as error:
        sys.exit(str(error))
    return names[0]


def with_samplers(cfg: CfgNode, positive: str, negative: str) -> CfgNode:
    """Return a copy of the config that names these samplers."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME = positive
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME = negative
    return cfg


def load_detector(cfg: CfgNode, weights: str) -> GeneralizedRCNN:
    """
    Load a detector in eval mode.

    Raises:
        ValueError: the model is not a two-stage detector of this package with an RPN.
    """
    model = build_model(cfg).eval()
    if not isinstance(model, GeneralizedRCNN) or model.proposal_generator is None:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} with "
            f"MODEL.PROPOSAL_GENERATOR.NAME {cfg.MODEL.PROPOSAL_GENERATOR.NAME!r} is no two-stage "
            "detector with proposals of its own. Name the config of one."
        )
    if not isinstance(model.roi_heads, PISAMixin):
        raise ValueError(
            f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME!r} are no heads with PISAMixin, whose "
            "samples could be shown. Name heads of this package, or add the mixin to yours."
        )
    DetectionCheckpointer(model).load(weights)
    return model


def samplers_of(cfg: CfgNode, names: Iterable[str]) -> dict[str, BatchSampler]:
    """Build the samplers of strategies."""
    return {name: build_batch_sampler(with_samplers(cfg, *STRATEGIES[name])) for name in names}


def labelled_test_images(cfg: CfgNode) -> Callable[[dict], dict]:
    """
    Make model inputs of records: images of test size with their objects, and with their regions to
    ignore if ``cfg`` enables these.
    """
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[resize])
    if not cfg.MODEL.IGNORED_REGIONS.ENABLED:
        return mapper
    # KeepRegions returns None only where its mapper does; DatasetMapper never does.
    return cast(Callable[[dict], dict], KeepRegions(mapper))


def rgb_image(inputs: dict, cfg: CfgNode) -> np.ndarray:
    """Return the image of the model's inputs, uint8 (H, W, 3)."""
    image = inputs["image"].permute(1, 2, 0).numpy()
    return image[:, :, ::-1] if cfg.INPUT.FORMAT == "BGR" else image
