"""
The configs of this package by name, as ``detectron2.model_zoo`` has Detectron2's. Trained weights
do not come with it; see MODEL_ZOO.md.
"""

import difflib
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig

from .config import read_config

# A wheel has them inside the package; a checkout has them next to it.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
_SUFFIXES = (".yaml", ".py")


def _folder() -> Path:
    return next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])


def list_configs() -> list[str]:
    """The names of all configs, such as "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"."""
    files = (path for path in _folder().rglob("*") if path.suffix in _SUFFIXES)
    return sorted(path.relative_to(_folder()).as_posix() for path in files)


def get_config_file(name: str) -> str:
    """
    The path of a config of this package.

    Args:
        name: its path in the folder of configs, such as
            "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml".

    Raises:
        ValueError: there is no such config.
    """
    names = list_configs()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        meant = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise ValueError(f"{name!r} is not a config of pisa_d2{meant}")
    return str(_folder() / name)


def find_config(path: str) -> str:
    """
    The path of a config: ``path`` itself, or where that does not exist, the config of this package
    of that name, with or without a leading "configs/".

    Raises:
        ValueError: there is neither.
    """
    if "://" in path or Path(path).exists():
        return path
    try:
        return get_config_file(path.removeprefix("configs/"))
    except ValueError as error:
        raise ValueError(f"--config-file {path!r}: there is no such file, and {error}") from None


def get_config(name: str, trained: bool = False) -> Any:
    """
    A config of this package: a ``CfgNode`` with all keys for a yaml file, a LazyConfig's
    ``DictConfig`` for a Python file.

    Args:
        name: see :func:`get_config_file`.
        trained: as in Detectron2, whether to name trained weights instead of those to train from.

    Raises:
        ValueError: there is no such config; or ``trained``, since it has no trained weights.
    """
    path = get_config_file(name)
    if trained:
        raise ValueError(
            f"There are no trained weights of {name!r}: train it, or load a checkpoint of your own."
        )
    if path.endswith(".py"):
        return LazyConfig.load(path)
    return read_config(path)
