"""What a training script looks at before it starts, so that no mistake costs hours."""

import os
import shutil
import tempfile
from contextlib import suppress
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.utils import comm
from torch import nn

from .config import look_up
from .data.checks import Classes, Needs, check_when_loaded
from .data.image_checks import Reading
from .engine.checkpoint import UNREADABLE
from .setting_checks import check_settings

_REGISTRIES = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}
_NOT_REGISTERED = {"PrecomputedProposals"}  # a name that Detectron2 knows all the same
_PROBE_BYTES = 2**20


def check_config(cfg: CfgNode, train: bool = True) -> None:
    """
    To be called before ``default_setup``, which opens files in ``OUTPUT_DIR``.

    Args:
        train: whether to check the settings of a training too.

    Raises:
        OSError: ``OUTPUT_DIR`` cannot be written to.
        ValueError: a name of a part of the model is unknown, or a setting would train nothing.
    """
    for key, registry in _REGISTRIES.items():
        node, _, leaf = key.rpartition(".")
        name = (cfg.MODEL[node] if node else cfg.MODEL)[leaf]
        if name not in _NOT_REGISTERED:
            look_up(registry, f"MODEL.{key}", name)
    if train:
        check_settings(cfg)
    if comm.is_main_process():
        check_output(cfg.OUTPUT_DIR)


def check_data(cfg: CfgNode, train: bool) -> None:
    """
    Have the datasets of ``cfg`` checked whenever they are loaded from now on, see
    :func:`pisa_d2.data.checks.check_dataset`.

    Args:
        train: whether to load those for evaluation now, rather than after the training.

    Raises:
        FileNotFoundError, ValueError: with the dataset, the file and how to fix it.
    """
    datasets = cfg.DATASETS
    check_when_loaded(datasets.TEST, "DATASETS.TEST", _needs(cfg, train=False, test=True))
    if train:
        for name in datasets.TRAIN:
            needs = _needs(cfg, train=True, test=name in datasets.TEST)
            check_when_loaded([name], "DATASETS.TRAIN", needs)
        for name in datasets.TEST:
            if name not in datasets.TRAIN:
                DatasetCatalog.get(name)


def _needs(cfg: CfgNode, train: bool, test: bool) -> Needs:
    sizes = [cfg.INPUT.MAX_SIZE_TRAIN] if train else []
    if test and cfg.INPUT.MIN_SIZE_TEST > 0:  # otherwise images are not resized
        sizes.append(cfg.INPUT.MAX_SIZE_TEST)
    return Needs(
        train=train,
        test=test,
        classes=model_classes(cfg),
        # In addition to others, a dataset of nothing but background may be intended.
        objects=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS or len(cfg.DATASETS.TRAIN) == 1,
        masks=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
        reading=Reading(cfg.INPUT.FORMAT, min(sizes, default=0), skips_damaged=not test),
    )


def model_classes(cfg: CfgNode) -> Classes | None:
    """The number of classes, or None for a meta-architecture of which it is not known."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture.endswith("RetinaNet"):
        return Classes("MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES)
    if architecture in ("GeneralizedRCNN", "PanopticFPN"):
        return Classes("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return None


def check_output(folder: str) -> None:
    """
    Make the folder, and write a megabyte to it that is taken away again.

    Raises:
        OSError: one of these is not possible.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise OSError(
            f"OUTPUT_DIR = {folder!r} cannot be written to ({error}). Name a folder that you "
            "may write to, on a disk with room for the checkpoints."
        ) from error


def check_model(cfg: CfgNode, model: nn.Module, resume: bool, train: bool) -> None:
    """
    Check a model that was built against the checkpoint that is to be loaded and the room on disk.

    Only what resumes, or evaluates, has to take over all of a checkpoint. A training may start from
    one of another number of classes: Detectron2 then warns of each part that it leaves out.

    Raises:
        OSError: there is no room for one checkpoint.
        ValueError: the checkpoint is of another model.
    """
    if train and comm.is_main_process():
        check_room(cfg.OUTPUT_DIR, model)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        with suppress(*UNREADABLE):  # which the trainer names, and passes over
            check_checkpoint(checkpointer.get_checkpoint_file(), model)
    elif not train and cfg.MODEL.WEIGHTS:
        check_checkpoint(cfg.MODEL.WEIGHTS, model)


def check_room(folder: str, model: nn.Module) -> None:
    """
    Raises:
        OSError: the disk has no room for the weights and the momentum of each.
    """
    needed = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The disk of OUTPUT_DIR = {folder!r} has {free / 2**20:.0f} MiB left, and a "
            f"checkpoint takes about {needed / 2**20:.0f} MiB. Make room, or name another folder."
        )


def check_checkpoint(path: str, model: nn.Module) -> None:
    """
    Raises:
        ValueError: a parameter in the file has another shape than in the model.
    """
    try:
        _Comparer(model).load(path, checkpointables=[])
    except ValueError as error:
        raise ValueError(f"'{path}' cannot be taken over. {error}") from None


class _Comparer(DetectionCheckpointer):
    """Compares a checkpoint with the model instead of loading it."""

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("matching_heuristics", False):  # of another library, with its own names
            return
        shapes = {_bare(name): tuple(p.shape) for name, p in self.model.state_dict().items()}
        for name, value in checkpoint["model"].items():
            there = tuple(value.shape)
            here = shapes.get(_bare(name), there)
            if here != there:
                raise ValueError(
                    f"The checkpoint is not of this model: {name} is {there} there and {here} "
                    "here, as when the number of classes differs. Use the config that it was "
                    "trained with; to train on from it with other classes, name it as "
                    "MODEL.WEIGHTS, without --resume, and another OUTPUT_DIR."
                )


def _bare(name: str) -> str:
    return name.removeprefix("module.")  # of a model that was wrapped for several GPUs
