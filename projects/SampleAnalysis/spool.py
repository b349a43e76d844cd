"""A list on disk."""

import pickle
import tempfile
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Spool(Generic[T]):
    """
    Items in a temporary file, which is deleted with the object: those of all images of a dataset
    may not fit in memory.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the object)
        self._size = 0

    def append(self, item: T) -> None:
        self._file.seek(0, 2)
        pickle.dump(item, self._file, pickle.HIGHEST_PROTOCOL)
        self._size += 1

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        position = 0
        for _ in range(self._size):
            self._file.seek(position)
            item = pickle.load(self._file)
            position = self._file.tell()
            yield item
