"""
Access to the configs of this package by name, like ``detectron2.model_zoo``. There are no trained
weights; see MODEL_ZOO.md.
"""

import difflib
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig

from .config import read_config

# A wheel has the configs inside the package; a checkout has them next to it.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
_SUFFIXES = (".yaml", ".py")


def _folder() -> Path:
    return next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])


def list_configs() -> list[str]:
    """List the names of all configs, such as "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"."""
    files = (path for path in _folder().rglob("*") if path.suffix in _SUFFIXES)
    return sorted(path.relative_to(_folder()).as_posix() for path in files)


def get_config_file(name: str) -> str:
    """
    Return the path of a config of this package.

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
    Find a config: ``path`` itself, or if it does not exist, the config of this package with that
    name, with or without a leading "configs/".

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
    Load a config of this package: a ``CfgNode`` with all keys from a yaml file, a LazyConfig's
    ``DictConfig`` from a Python file.

    Args:
        name: see :func:`get_config_file`.
        trained: as in Detectron2, whether to name trained weights instead of the initial ones.

    Raises:
        ValueError: there is no such config, or ``trained`` is set, since there are no trained
            weights.
    """
    path = get_config_file(name)
    if trained:
        raise ValueError(
            f"There are no trained weights of {name!r}: train it, or load your own checkpoint."
        )
    if path.endswith(".py"):
        return LazyConfig.load(path)
    return read_config(path)
