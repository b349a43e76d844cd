"""What a training script looks at before it starts, so that no mistake costs hours."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.utils import comm

from .config import look_up
from .data.checks import check_when_loaded
from .data.classes import check_same_classes, model_classes
from .engine.run_folder import check_output

_REGISTRIES = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}
_NOT_REGISTERED = {"PrecomputedProposals"}  # a name that Detectron2 knows all the same


def check_config(cfg: CfgNode) -> None:
    """
    To be called before ``default_setup``, which opens files in ``OUTPUT_DIR``.

    Raises:
        OSError: ``OUTPUT_DIR`` cannot be written to.
        ValueError: a name of a part of the model is unknown.
    """
    for key, registry in _REGISTRIES.items():
        node, _, leaf = key.rpartition(".")
        name = (cfg.MODEL[node] if node else cfg.MODEL)[leaf]
        if name not in _NOT_REGISTERED:
            look_up(registry, f"MODEL.{key}", name)
    if comm.is_main_process():
        check_output(cfg.OUTPUT_DIR)


def check_data(cfg: CfgNode, train: bool) -> None:
    """
    Have the data sets of ``cfg`` checked whenever they are loaded from now on, see
    :func:`pisa_d2.data.checks.check_dataset`.

    Args:
        train: whether those for evaluation are loaded now, rather than after the training.

    Raises:
        FileNotFoundError, ValueError: with the data set, the file and how to mend it.
    """
    classes = model_classes(cfg)
    datasets = cfg.DATASETS
    # Beside others, a data set of nothing but background can be meant.
    needs_objects = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS or len(datasets.TRAIN) == 1
    check_when_loaded(datasets.TEST, "DATASETS.TEST", classes, needs_objects=False)
    if train:
        if not datasets.TRAIN:
            raise ValueError(
                "DATASETS.TRAIN is empty: name a dataset to train on. To register your own, set "
                "DATASETS.REGISTER."
            )
        check_when_loaded(datasets.TRAIN, "DATASETS.TRAIN", classes, needs_objects)
        for name in datasets.TEST:
            if name not in datasets.TRAIN:
                DatasetCatalog.get(name)
    check_same_classes(cfg, read=not train)
