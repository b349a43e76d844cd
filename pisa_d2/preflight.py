"""Checks to run before training, so that a mistake costs seconds and not hours."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.utils import comm

from .config import ignored_ioa_thresh, look_up
from .data.checks import Needs, check_when_loaded
from .data.classes import check_same_classes, model_classes
from .data.image_checks import Reading
from .engine.run_folder import check_output
from .regions import warn_of_gaps
from .setting_checks import check_settings

_REGISTRIES = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}
_NOT_REGISTERED = {"PrecomputedProposals"}  # a name that Detectron2 knows without registering it


def check_config(cfg: CfgNode, train: bool = True) -> None:
    """
    Check names, settings and ``OUTPUT_DIR``. Call this before ``default_setup``, which opens files
    in ``OUTPUT_DIR``.

    Args:
        train: whether to check the settings for training too.

    Raises:
        OSError: ``OUTPUT_DIR`` cannot be written to.
        ValueError: the name of a part of the model is unknown, or a setting would train nothing.
    """
    for key, registry in _REGISTRIES.items():
        node, _, leaf = key.rpartition(".")
        name = (cfg.MODEL[node] if node else cfg.MODEL)[leaf]
        if name not in _NOT_REGISTERED:
            look_up(registry, f"MODEL.{key}", name)
    if train:
        check_settings(cfg)
        warn_of_gaps(cfg)
    if comm.is_main_process():
        check_output(cfg.OUTPUT_DIR)


def check_data(cfg: CfgNode, train: bool) -> None:
    """
    Check the datasets of ``cfg`` whenever they are loaded from now on, see
    :func:`pisa_d2.data.checks.check_dataset`.

    Args:
        train: whether to load the datasets for evaluation now instead of after the training.

    Raises:
        FileNotFoundError, ValueError: a dataset is faulty. The message names the dataset, the file
            and the fix.
    """
    datasets = cfg.DATASETS
    check_when_loaded(datasets.TEST, "DATASETS.TEST", _needs(cfg, train=False, test=True))
    if train:
        if not datasets.TRAIN:
            raise ValueError(
                "DATASETS.TRAIN is empty: name a dataset to train on. To register your own, set "
                "DATASETS.REGISTER."
            )
        for name in datasets.TRAIN:
            needs = _needs(cfg, train=True, test=name in datasets.TEST)
            check_when_loaded([name], "DATASETS.TRAIN", needs)
        for name in datasets.TEST:
            if name not in datasets.TRAIN:
                DatasetCatalog.get(name)
    check_same_classes(cfg, read=not train)


def _needs(cfg: CfgNode, train: bool, test: bool) -> Needs:
    sizes = [cfg.INPUT.MAX_SIZE_TRAIN] if train else []
    if test and cfg.INPUT.MIN_SIZE_TEST > 0:  # otherwise images are not resized
        sizes.append(cfg.INPUT.MAX_SIZE_TEST)
    return Needs(
        train=train,
        test=test,
        classes=model_classes(cfg),
        # Next to other datasets, one of pure background may be intended.
        objects=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS or len(cfg.DATASETS.TRAIN) == 1,
        masks=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
        ignores_regions=ignored_ioa_thresh(cfg) is not None,
        reading=Reading(cfg.INPUT.FORMAT, min(sizes, default=0), skips_damaged=not test),
    )
