"""
The choice between ways of computing that suit a CPU or a GPU.

A CPU is fast with little arithmetic, a GPU with few operators and few copies to the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_as_on_gpu = False


def suits_gpu(values: Tensor) -> bool:
    """Return whether to compute with ``values`` in the way that suits a GPU."""
    return _as_on_gpu or values.is_cuda


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Compute as on a GPU on any device, to test that way and to count its operators."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before
