"""Checks that a model and its datasets agree in the number, names and order of classes."""

import logging
from collections.abc import Iterable

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from .checks import Classes
from .registered import RegisteredDataset, registered_dataset

logger = logging.getLogger(__name__)


def model_classes(cfg: CfgNode) -> Classes | None:
    """Return the number of classes, or None for an unknown meta-architecture."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture.endswith("RetinaNet"):
        return Classes("MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES)
    if architecture.endswith("SSD") and "SSD" in cfg.MODEL:
        return Classes("MODEL.SSD.NUM_CLASSES", cfg.MODEL.SSD.NUM_CLASSES)
    if architecture in ("GeneralizedRCNN", "PanopticFPN"):
        return Classes("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return None


def take_num_classes(cfg: CfgNode) -> None:
    """
    Set a number of classes that is Detectron2's default, 80, to the number in the first dataset of
    ``DATASETS.TRAIN`` or ``TEST`` that ``DATASETS.REGISTER`` lists.

    A file that cannot be read is no error here: loading the dataset reports it.
    """
    classes = model_classes(cfg)
    if classes is None or classes.num != get_cfg().MODEL.ROI_HEADS.NUM_CLASSES:
        return
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        things = _read_classes(name)
        if things:
            cfg.merge_from_list([classes.key, len(things)])
            logger.info("%s = %d: %s.", classes.key, len(things), ", ".join(things))
            return


def _read_classes(name: str) -> list[str] | None:
    dataset = registered_dataset(name) if name in DatasetCatalog else None
    if not isinstance(dataset, RegisteredDataset):
        return None
    try:
        return dataset.classes()
    except (AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError):
        return None


def check_same_classes(cfg: CfgNode, read: bool = False) -> None:
    """
    Compare the classes of the datasets for training and evaluation by name and order. The classes
    of Detectron2's datasets are known in advance, the classes of a COCO json after it is loaded.

    Args:
        read: whether to read the datasets in ``DATASETS.REGISTER`` if possible.

    Raises:
        ValueError: the classes differ. The message has both lists.
    """
    datasets = [("TRAIN", name) for name in cfg.DATASETS.TRAIN]
    datasets += [("TEST", name) for name in cfg.DATASETS.TEST]
    known: list[tuple[str, list[str]]] = []
    for key, name in datasets:
        things = MetadataCatalog.get(name).get("thing_classes")
        if things is None and read:
            things = _read_classes(name)
        if things is not None:
            known.append((f"'{name}' (DATASETS.{key})", list(things)))
    for name, things in known[1:]:
        first, expected = known[0]
        if things != expected:
            raise ValueError(
                f"Datasets {first} and {name} have different classes, or a different order. "
                f"{first}: {_numbered(expected)}. {name}: {_numbered(things)}. A model knows only "
                "the numbers, so both must list the same names in the same order. COCO's format "
                'orders "categories" by id: give them the same ids in each file.'
            )


def _numbered(names: Iterable[str]) -> str:
    return ", ".join(f"{i} {name}" for i, name in enumerate(names))
