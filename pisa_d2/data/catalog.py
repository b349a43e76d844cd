from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog


def register_dataset(name: str, load: Callable[[], list[dict]], **metadata: Any) -> None:
    """Register ``load`` and the metadata with Detectron2, in the place of an earlier ``name``."""
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
