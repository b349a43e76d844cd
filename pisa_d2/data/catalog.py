"""Registration of a dataset and its metadata with Detectron2, and a choice of its records."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from detectron2.data import DatasetCatalog, MetadataCatalog

T = TypeVar("T")


def evenly(items: Sequence[T], num: int) -> list[T]:
    """Take ``num`` items, or all if there are fewer: the middle of each of ``num`` equal parts."""
    num = min(num, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * num)] for i in range(num)]


def register_dataset(
    name: str, load: Callable[[], list[dict]], replace: bool = True, **metadata: Any
) -> None:
    """
    Register ``load`` and the metadata with Detectron2. A registered ``name`` is replaced, or kept
    with ``replace=False``.
    """
    if name in DatasetCatalog and not replace:
        return
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
