from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog


def register_dataset(
    name: str, load: Callable[[], list[dict]], replace: bool = True, **metadata: Any
) -> None:
    """
    Register ``load`` and the metadata with Detectron2. An earlier ``name`` is replaced, or with
    ``replace=False`` left alone.
    """
    if name in DatasetCatalog and not replace:
        return
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
