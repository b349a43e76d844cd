"""The config keys of this package, and their translation into arguments of constructors."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from fvcore.common.registry import Registry

from .box_losses import BALANCED_L1
from .settings import (
    CARL,
    ISR,
    BalancedL1,
    NegativeISR,
    SettingError,
    check_count,
    check_flag,
    check_ioa_thresh,
    check_positive,
    check_range,
    naming_keys,
)

__all__ = [
    "BALANCED_L1",
    "CARL",
    "ISR",
    "BalancedL1",
    "NegativeISR",
    "SettingError",
    "add_pisa_config",
    "balanced_l1_settings",
    "check_count",
    "check_flag",
    "check_positive",
    "check_range",
    "focal_gamma",
    "ignored_ioa_thresh",
    "look_up",
    "pisa_settings",
]


def add_pisa_config(cfg: CN) -> None:
    """Add the keys of this package, with the published settings, to ``cfg`` in place."""
    # Your own datasets, for DATASETS.TRAIN and DATASETS.TEST: a list of
    # [name, annotation file, image folder] in COCO's format and
    # [name, folder or ImageSets file] in Pascal VOC's.
    cfg.DATASETS.REGISTER = []

    # How proposals are matched to objects: a name in PROPOSAL_MATCHER_REGISTRY.
    cfg.MODEL.ROI_HEADS.PROPOSAL_MATCHER = "IoUMatcher"

    # Regions to ignore: boxes of annotations with `iscrowd: 1` or `ignore: 1`, and Pascal VOC's
    # difficult objects. A proposal or anchor is ignored if it is not positive and has at least
    # IOA_THRESH (in (0, 1]) of its own area inside one of them. If off, crowds are left out and
    # the others are objects. The RPN needs MODEL.PROPOSAL_GENERATOR.NAME "PISARPN".
    cfg.MODEL.IGNORED_REGIONS = CN()
    cfg.MODEL.IGNORED_REGIONS.ENABLED = False
    cfg.MODEL.IGNORED_REGIONS.IOA_THRESH = 0.5

    # PISARPN: how anchors are chosen, see ROI_HEADS below; samplers that need the box head's
    # predictions are not allowed.
    cfg.MODEL.RPN.POSITIVE_SAMPLER = CN()
    cfg.MODEL.RPN.POSITIVE_SAMPLER.NAME = "RandomSampler"
    cfg.MODEL.RPN.NEGATIVE_SAMPLER = CN()
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.NAME = "RandomSampler"
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED = CN()
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS = 3
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_THRESH = -1.0
    cfg.MODEL.RPN.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_FRACTION = 0.0
    # The largest number of negatives per chosen positive in an image; without a positive, as many
    # as for one. At least 1, or -1 for no limit. Libra R-CNN's release has 5.
    cfg.MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE = -1

    # How proposals are chosen for training: names in PROPOSAL_SAMPLER_REGISTRY. Name a sampler that
    # chooses both kinds together twice. BATCH_SIZE_PER_IMAGE and POSITIVE_FRACTION set how many,
    # as in Detectron2.
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER = CN()
    cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME = "RandomSampler"
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = CN()
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME = "RandomSampler"

    # IoUBalancedSampler: number of equal bins of the negatives' IoU. At least 1.
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED = CN()
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED.NUM_BINS = 3
    # If FLOOR_THRESH is not negative, the bins begin at this IoU, and FLOOR_FRACTION (in [0, 1]) of
    # the negatives come from below it, or from boxes that overlap nothing if it is 0.
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_THRESH = -1.0
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED.FLOOR_FRACTION = 0.0

    # ScoreHLRSampler: the meaning is as in ISR_N below, which uses this sampler's ranks instead of
    # its own.
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.SCORE_HLR = CN()
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.SCORE_HLR.NMS_THRESH = 0.5
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.SCORE_HLR.SCORE_THRESH = 0.05

    # HardSampler for both kinds: choose positives and negatives together, from all images on a
    # process, by classification and box loss, as OHEM was published (the OHEMSampler).
    # POSITIVE_FRACTION is then ignored.
    cfg.MODEL.ROI_HEADS.HARD_SAMPLER = CN()
    cfg.MODEL.ROI_HEADS.HARD_SAMPLER.JOINT = False
    # OHEMSampler: of proposals in one image and class that overlap by more than this IoU, only the
    # hardest can be chosen. In [0, 1].
    cfg.MODEL.ROI_HEADS.HARD_SAMPLER.NMS_THRESH = 0.7

    # Softmax focal loss, (1 - p) ** GAMMA times the cross entropy, in the box predictor.
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_LOSS = CN()
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_LOSS.ENABLED = False
    # GAMMA >= 0: 0 is cross entropy.
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_LOSS.GAMMA = 2.0

    # Balanced L1 (https://arxiv.org/abs/1904.02701), if BBOX_REG_LOSS_TYPE of ROI_BOX_HEAD or
    # RETINANET is "balanced_l1". Its beta is smooth L1's, in the same node, and above 0.
    cfg.MODEL.BALANCED_L1 = CN()
    # Above 0: the gradient of an error x is ALPHA * ln(b * x / beta + 1) below beta.
    cfg.MODEL.BALANCED_L1.ALPHA = 0.5
    # In [ALPHA / 1000, 40 ALPHA]: the gradient from beta on, which sets b.
    cfg.MODEL.BALANCED_L1.GAMMA = 1.5

    # Prime Sample Attention, https://arxiv.org/abs/1904.04821
    cfg.MODEL.PISA = CN()

    # Stages of a cascade, counted from 0, with the parts below; empty for all.
    cfg.MODEL.PISA.CASCADE_STAGES = []

    # Importance-based sample reweighting of the classification loss. A sample of rank r (from 0)
    # among n weighs ((1 - BETA) * (n - r) / n + BETA) ** GAMMA, scaled to keep the total loss.
    # GAMMA >= 0: 0 gives all the same weight, larger values favour the first ranks more.
    # BETA in [0, 1]: the least importance; 1 gives all the same weight.

    # ISR-P: positives, ranked in each class by the IoU of their regressed boxes (IoU-HLR).
    cfg.MODEL.PISA.ISR_P = CN()
    cfg.MODEL.PISA.ISR_P.ENABLED = True
    cfg.MODEL.PISA.ISR_P.GAMMA = 2.0
    cfg.MODEL.PISA.ISR_P.BETA = 0.0
    # The divisor of ranks: "shared", the number of positives of the largest class, as published, so
    # that classes with few positives also weigh more; or "class", each class's own number.
    cfg.MODEL.PISA.ISR_P.N_MAX = "shared"

    # ISR-N: negatives, ranked in each image by their highest foreground score (Score-HLR).
    cfg.MODEL.PISA.ISR_N = CN()
    cfg.MODEL.PISA.ISR_N.ENABLED = True
    cfg.MODEL.PISA.ISR_N.GAMMA = 0.5
    cfg.MODEL.PISA.ISR_N.BETA = 0.0
    # Negatives whose regressed boxes overlap by more than this IoU form a group. In [0, 1].
    cfg.MODEL.PISA.ISR_N.NMS_THRESH = 0.5
    # Negatives with at most this score get the weight of the last ranked one. In [0, 1].
    cfg.MODEL.PISA.ISR_N.SCORE_THRESH = 0.05

    # Classification-aware regression loss: a second box loss in which a positive whose class has
    # probability p weighs in proportion to ((1 - BETA) * p + BETA) ** GAMMA, with gradient to p.
    cfg.MODEL.PISA.CARL = CN()
    cfg.MODEL.PISA.CARL.ENABLED = True
    # GAMMA >= 0 (k in the paper): 0 makes it a plain second box loss.
    cfg.MODEL.PISA.CARL.GAMMA = 1.0
    # BETA in [0, 1] (b in the paper).
    cfg.MODEL.PISA.CARL.BETA = 0.2
    # Factor of the loss, >= 0. ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT does not apply to it.
    cfg.MODEL.PISA.CARL.LOSS_WEIGHT = 1.0


def read_config(path: str, add_config: Callable[[CN], None] = add_pisa_config) -> CN:
    """
    Read a yaml config, with ``_BASE_``.

    Args:
        add_config: adds the keys that the file may have to Detectron2's, in place.
    """
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(path)
    return cfg


def look_up(registry: Registry, key: str, name: Any) -> Any:
    """
    Find the class registered as ``name``, the value of the config key ``key``.

    Raises:
        ValueError: no class is registered as ``name``. The message has the key and the choices.
    """
    if not isinstance(name, str) or name not in registry:
        choices = sorted(registered for registered, _ in registry)
        raise ValueError(f"{key} = {name!r} is not known: choose one of {choices}.")
    return registry.get(name)


T = TypeVar("T", ISR, NegativeISR, CARL)


def _read(cls: type[T], cfg: CN, name: str) -> T | None:
    node = cfg.MODEL.PISA[name]
    with naming_keys(f"MODEL.PISA.{name}"):
        settings = cls(**{field.name: node[field.name.upper()] for field in fields(cls)})
    check_flag(f"MODEL.PISA.{name}.ENABLED", node.ENABLED)
    return settings if node.ENABLED else None


def pisa_settings(cfg: CN) -> dict[str, Any]:
    """
    Read the parts of PISA from ``cfg``.

    Returns:
        ``isr_p``, ``isr_n`` and ``carl``, None for a part that is off.

    Raises:
        ValueError: a value is out of range, or ``cfg`` has no such keys.
    """
    if "PISA" not in cfg.MODEL:
        raise ValueError(
            "The config has no MODEL.PISA: call pisa_d2.add_pisa_config(cfg) after get_cfg() and "
            "before merging a file."
        )
    return {
        "isr_p": _read(ISR, cfg, "ISR_P"),
        "isr_n": _read(NegativeISR, cfg, "ISR_N"),
        "carl": _read(CARL, cfg, "CARL"),
    }


def balanced_l1_settings(cfg: CN, head: str, beta: str) -> BalancedL1:
    """
    Read the settings of balanced L1 from ``cfg``.

    Args:
        head: the node under MODEL with ``BBOX_REG_LOSS_TYPE``.
        beta: the key of the beta in this node.

    Raises:
        ValueError: a value is out of range. The beta is checked only if the loss is chosen.
    """
    node = cfg.MODEL[head]
    if node.BBOX_REG_LOSS_TYPE == BALANCED_L1:
        reason = f", since BBOX_REG_LOSS_TYPE is {BALANCED_L1!r}"
        check_positive(f"MODEL.{head}.{beta}", node[beta], reason)
    with naming_keys("MODEL.BALANCED_L1"):
        return BalancedL1(cfg.MODEL.BALANCED_L1.ALPHA, cfg.MODEL.BALANCED_L1.GAMMA)


def check_stages(name: str, stages: Sequence[int], num_stages: int) -> None:
    """
    Check stages of a cascade.

    Raises:
        ValueError: ``stages`` names a stage that a cascade of ``num_stages`` does not have.
    """
    if any(stage not in range(num_stages) for stage in stages):
        raise SettingError(name, stages, f"the stages are {list(range(num_stages))}")


def ignored_ioa_thresh(cfg: CN) -> float | None:
    """
    Read the threshold of regions to ignore from ``cfg``.

    Returns:
        The share of a box's area inside a region from which the box is ignored, None if regions are
        not to be ignored.

    Raises:
        ValueError: it is out of range.
    """
    settings = cfg.MODEL.IGNORED_REGIONS
    check_flag("MODEL.IGNORED_REGIONS.ENABLED", settings.ENABLED)
    check_ioa_thresh("MODEL.IGNORED_REGIONS.IOA_THRESH", settings.IOA_THRESH)
    return settings.IOA_THRESH if settings.ENABLED else None


def focal_gamma(cfg: CN) -> float | None:
    """
    Read the exponent of focal loss from ``cfg``.

    Returns:
        The exponent, None if focal loss is off.

    Raises:
        ValueError: it is out of range.
    """
    settings = cfg.MODEL.ROI_BOX_HEAD.FOCAL_LOSS
    check_flag("MODEL.ROI_BOX_HEAD.FOCAL_LOSS.ENABLED", settings.ENABLED)
    check_range("MODEL.ROI_BOX_HEAD.FOCAL_LOSS.GAMMA", settings.GAMMA, 0)
    return settings.GAMMA if settings.ENABLED else None
