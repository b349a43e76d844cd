"""
Which way to compute what takes different ways on a CPU and on a GPU.

A CPU is best given little to compute, a GPU few operators and few questions about their results.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_as_on_gpu = False


def suits_gpu(values: Tensor) -> bool:
    """Whether to compute with ``values`` in the way of a GPU."""
    return _as_on_gpu or values.is_cuda


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Compute in the way of a GPU on any device, to test that way and to count its operators."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before
