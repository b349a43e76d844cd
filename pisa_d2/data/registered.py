"""Registration of the datasets in a config, and of this package's, with Detectron2."""

import difflib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .bccd import register_bccd
from .catalog import register_dataset
from .coco import read_coco
from .digits import register_digits
from .voc import load_voc, voc_classes

KEY = "DATASETS.REGISTER"
_FORM = "[name, annotation file, image folder] for COCO, [name, folder or ImageSets file] for VOC"


def register_builtin_datasets(root: str | os.PathLike | None = None) -> None:
    """
    Register ``bccd_*`` and ``digits_*``. Registered names stay as they are. Nothing is read or made
    before a dataset is loaded.

    Args:
        root: the folder of the datasets; by default ``$DETECTRON2_DATASETS``, or "datasets" if that
            is not set.
    """
    root = os.getenv("DETECTRON2_DATASETS", "datasets") if root is None else root
    register_bccd(root, replace=False)
    register_digits(root, replace=False)


def register_from_config(cfg: CfgNode) -> None:
    """
    Register the built-in datasets and the ones in ``DATASETS.REGISTER``, see
    :func:`register_datasets`. Unless ``cfg`` is frozen, its paths are made absolute, so that a
    saved config works in any folder.
    """
    register_builtin_datasets()
    entries = register_datasets(cfg.DATASETS.REGISTER)
    if not cfg.is_frozen():
        cfg.DATASETS.REGISTER = entries


def register_datasets(entries: Sequence[Sequence[str]]) -> list[list[str]]:
    """
    Register datasets in COCO's or Pascal VOC's format for training and COCO evaluation. Nothing is
    read before a dataset is loaded.

    Args:
        entries: for each dataset [name, annotation file, image folder] in COCO's format, see
            :func:`pisa_d2.data.coco.load_coco`, or [name, folder or ImageSets file] in Pascal
            VOC's, see :func:`pisa_d2.data.voc.load_voc`. All VOC datasets have the same classes:
            the names that occur in any of them, sorted. A path may begin with ``~``. A name from an
            earlier call is registered again.

    Returns:
        The entries with absolute paths.

    Raises:
        ValueError: an entry has a different form, or its name is taken.
    """
    checked = [_check_entry(entry) for entry in entries]
    names = [name for name, *_ in checked]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{KEY} lists {name!r} twice; each name may occur only once.")
        if name in DatasetCatalog and not isinstance(registered_dataset(name), RegisteredDataset):
            raise ValueError(
                f"{KEY} lists {name!r}, but a dataset of this name is registered already. "
                "Choose another name."
            )

    folders = [paths[0] for _, *paths in checked if len(paths) == 1]
    common = functools.cache(lambda: sorted({c for path in folders for c in voc_classes(path)}))
    for name, path, *image_root in checked:
        if image_root:
            dataset = RegisteredDataset(name, functools.partial(_read_coco, path, image_root[0]))
            files: dict[str, Any] = {"json_file": path, "image_root": image_root[0]}
        else:
            dataset = RegisteredDataset(name, functools.partial(_read_voc, path, common))
            files = {}
        register_dataset(name, dataset, evaluator_type="coco", **files)
    return checked


def registered_dataset(name: str) -> Any:
    """Return the function that loads a registered dataset, without the checks around it."""
    loader = DatasetCatalog.data[name]
    return getattr(loader, "load", loader)


def _check_entry(entry: Any) -> list[str]:
    parts = list(entry) if isinstance(entry, (list, tuple)) else []
    if len(parts) not in (2, 3) or not all(isinstance(p, str) and p.strip() for p in parts):
        raise ValueError(f"{KEY} has the entry {entry!r}; each must be {_FORM}.")
    if len(parts) == 2 and parts[1].endswith(".json"):
        raise ValueError(f"{KEY}: {entry!r} has no image folder; an entry must be {_FORM}.")
    name, *paths = parts
    return [name, *(_absolute(path) for path in paths)]


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _read_coco(json_file: str, image_root: str) -> tuple[list[dict], dict[str, Any]]:
    data = read_coco(json_file, image_root)
    metadata = {
        "thing_classes": data.classes,
        "thing_dataset_id_to_contiguous_id": data.class_ids,
    }
    return data.records, metadata


def _read_voc(path: str, classes: Callable[[], list[str]]) -> tuple[list[dict], dict[str, Any]]:
    return load_voc(path, classes()), {"thing_classes": classes()}


class RegisteredDataset:
    """
    The loader of a dataset that :func:`register_datasets` registered. Reading the dataset adds the
    classes to its metadata.
    """

    def __init__(
        self, name: str, read: Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]]
    ) -> None:
        """
        Args:
            name: the name of the dataset.
            read: returns the records, in Detectron2's format, and the metadata.
        """
        self.name = name
        self.read = read
        self._unused: list[dict[str, Any]] | None = None

    def __call__(self) -> list[dict[str, Any]]:
        records = self._read() if self._unused is None else self._unused
        self._unused = None
        return records

    def classes(self) -> list[str]:
        """Read the class names. The next call that loads the dataset does not read it again."""
        if self._unused is None:
            self._unused = self._read()
        return MetadataCatalog.get(self.name).thing_classes

    def _read(self) -> list[dict[str, Any]]:
        records, metadata = self.read()
        MetadataCatalog.get(self.name).set(**metadata)
        return records


def unregistered(key: str, name: str) -> ValueError:
    """Make the error that says how to register ``name``, the value of the config key ``key``."""
    near = difflib.get_close_matches(name, list(DatasetCatalog), n=3)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(
        f"{key} = {name!r} is not a registered dataset.{meant} To register your own, set {KEY} to "
        f"[[{name!r}, 'annotations.json', 'image folder']] for COCO's format or "
        f"[[{name!r}, 'folder']] for Pascal VOC's, or call "
        "detectron2.data.datasets.register_coco_instances before training."
    )


def check_registered(key: str, names: Sequence[str]) -> None:
    """
    Check that ``names``, the value of the config key ``key``, are registered.

    Raises:
        ValueError: a name is not.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise unregistered(key, name)
