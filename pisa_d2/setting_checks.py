"""Checks of settings with which training would learn nothing or fail without a clear reason."""

import math

from detectron2.config import CfgNode

from .samplers import PROPOSAL_SAMPLER_REGISTRY, BatchSampler
from .settings import check_count, check_positive, check_range

_TWO_STAGE = ("GeneralizedRCNN", "PanopticFPN")
_COCO_KEYPOINTS = 17  # the evaluation has standard deviations for this number of keypoints


def _ignores_fraction(cfg: CfgNode) -> bool:
    """Return whether one sampler chooses both kinds and ignores the fraction of positives."""
    heads = cfg.MODEL.ROI_HEADS
    name = heads.POSITIVE_SAMPLER.NAME
    registered = name in PROPOSAL_SAMPLER_REGISTRY  # if not, building the model fails
    return heads.HARD_SAMPLER.JOINT or (
        registered and issubclass(PROPOSAL_SAMPLER_REGISTRY.get(name), BatchSampler)
    )


def _check_samples(cfg: CfgNode, name: str) -> None:
    """Check the numbers of samples and of positives per image, of RPN or ROI_HEADS."""
    size, fraction = cfg.MODEL[name].BATCH_SIZE_PER_IMAGE, cfg.MODEL[name].POSITIVE_FRACTION
    check_count(f"MODEL.{name}.BATCH_SIZE_PER_IMAGE", size, 1)
    if name == "ROI_HEADS" and _ignores_fraction(cfg):
        return
    check_range(f"MODEL.{name}.POSITIVE_FRACTION", fraction, 0, 1)
    if int(size * fraction) == 0:
        way = f", or BATCH_SIZE_PER_IMAGE to at least {math.ceil(1 / fraction)}" if fraction else ""
        raise ValueError(
            f"MODEL.{name}.BATCH_SIZE_PER_IMAGE = {size} and POSITIVE_FRACTION = {fraction} leave "
            f"no room for a positive sample, so nothing would be learnt: their product must be at "
            f"least 1. Set POSITIVE_FRACTION to at least {1 / size:.3g}{way}."
        )


def _check_matcher(cfg: CfgNode, name: str) -> None:
    """Check the thresholds and labels of the matcher of RPN, ROI_HEADS or RETINANET."""
    thresholds, labels = list(cfg.MODEL[name].IOU_THRESHOLDS), list(cfg.MODEL[name].IOU_LABELS)
    for threshold in thresholds:
        check_positive(f"MODEL.{name}.IOU_THRESHOLDS", threshold)
        check_range(f"MODEL.{name}.IOU_THRESHOLDS", threshold, 0, 1)
    if thresholds != sorted(thresholds) or len(labels) != len(thresholds) + 1:
        raise ValueError(
            f"MODEL.{name}.IOU_THRESHOLDS = {thresholds} and IOU_LABELS = {labels} do not fit: "
            "thresholds must ascend, with one label below each and one above the last."
        )
    if not set(labels) <= {-1, 0, 1} or 1 not in labels:
        raise ValueError(
            f"MODEL.{name}.IOU_LABELS = {labels} is not allowed: labels are 0 (background), -1 "
            "(ignored) and 1 (positive), and without 1 nothing would be learnt."
        )


def _check_cascade(cfg: CfgNode) -> None:
    thresholds = list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS)
    ious = list(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    if thresholds != ious[:1]:
        raise ValueError(
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS = {thresholds} is not allowed in a cascade, whose "
            f"stages have the thresholds MODEL.ROI_BOX_CASCADE_HEAD.IOUS = {tuple(ious)}: set "
            f"IOU_THRESHOLDS to {ious[:1]} and IOU_LABELS to [0, 1]."
        )
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False is not allowed in a cascade: set it "
            "to True."
        )


def _check_keypoints(cfg: CfgNode) -> None:
    num, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if len(sigmas) != num and (sigmas or num != _COCO_KEYPOINTS) and cfg.DATASETS.TEST:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS = {sigmas} must have a number for each of the "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = {num} keypoints, or evaluation fails. For "
            f"example: [{', '.join(['0.05'] * min(num, 3))}{', ...' if num > 3 else ''}]."
        )


def check_settings(cfg: CfgNode) -> None:
    """
    Check the settings of a training.

    Raises:
        ValueError: with these settings nothing would be trained, or training or evaluation would
            fail later. The message names the key, the value and the allowed values.
    """
    check_count("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, 1)
    check_positive("SOLVER.BASE_LR", cfg.SOLVER.BASE_LR)
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture.endswith("RetinaNet"):
        check_count("MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES, 1)
        _check_matcher(cfg, "RETINANET")
    if architecture in (*_TWO_STAGE, "ProposalNetwork") and not cfg.MODEL.LOAD_PROPOSALS:
        check_count("MODEL.RPN.PRE_NMS_TOPK_TRAIN", cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, 1)
        check_count("MODEL.RPN.POST_NMS_TOPK_TRAIN", cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, 1)
        _check_samples(cfg, "RPN")
        _check_matcher(cfg, "RPN")
    if architecture in _TWO_STAGE:
        check_count("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES, 1)
        _check_samples(cfg, "ROI_HEADS")
        _check_matcher(cfg, "ROI_HEADS")
        if "Cascade" in cfg.MODEL.ROI_HEADS.NAME:
            _check_cascade(cfg)
        if cfg.MODEL.KEYPOINT_ON:
            _check_keypoints(cfg)
