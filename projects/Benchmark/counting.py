"""
Count the operators that a call runs, and find where it waits for the device.

An operator costs a GPU some microseconds however little it computes, and a wait keeps the host from
issuing the next one. Both counts are exact for a given input, and the same on every machine: calls
that take the path of a GPU (see :func:`pisa_d2.devices.as_on_gpu`) are counted on a CPU.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import detectron2
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import pisa_d2
from pisa_d2.devices import as_on_gpu

# Where a line that runs an operator is looked for, by the name that its path is given.
_ROOTS = {
    "pisa_d2": Path(pisa_d2.__file__).parent,
    "detectron2": Path(detectron2.__file__).parent,
}
# No kernel runs for these: allocations, and views that their schema does not tell.
_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor"),
    *("_unsafe_view", "lift_fresh", "promote_types"),
}
# The shape or the value of their result is known to the host only after the device is done.
_WAITING_OPERATORS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "nms"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount"),
}
# On a CPU these run no operator.
_WAITING_METHODS = {"tolist", "cpu", "numpy"}


class Place(NamedTuple):
    """A line of pisa_d2 or of Detectron2, and the operator that it runs."""

    file: str
    line: int
    function: str
    operator: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.operator}"


class Counts:
    """
    Attributes:
        operators: how often each operator of each place ran, without views and allocations.
        waits: how often each place waited for the device.
    """

    def __init__(self) -> None:
        self.operators: Counter[Place] = Counter()
        self.waits: Counter[Place] = Counter()

    @property
    def num_operators(self) -> int:
        return self.operators.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()


def _place(operator: str) -> Place:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for name, root in _ROOTS.items():
            if path.is_relative_to(root):
                file = f"{name}/{path.relative_to(root)}"
                return Place(file, frame.f_lineno, frame.f_code.co_name, operator)
        frame = frame.f_back
    return Place("backward or elsewhere", 0, "", operator)


def _is_free(func: Any) -> bool:
    name = func._schema.name.split("::")[1]
    of_views = (r.alias_info for r in func._schema.returns)
    return name in _FREE or any(alias is not None and not alias.is_write for alias in of_views)


def _waits(name: str, args: tuple) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]]
        # torch fills a scalar in through a mask without a wait.
        return any(masks) and (name == "index" or len(masks) > 1 or args[2].numel() != 1)
    return name in _WAITING_OPERATORS


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if not _is_free(func):
            self.counts.operators[_place(name)] += 1
        if _waits(name, args):
            self.counts.waits[_place(name)] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _WAITING_METHODS:
            self.counts.waits[_place(name)] += 1
        return func(*args, **(kwargs or {}))


class counting(AbstractContextManager):  # noqa: N801
    """
    Count what the block runs, on the path of a GPU::

        with counting() as counts:
            losses = predictor.losses(predictions, proposals)
        print(counts.num_operators)
    """

    def __enter__(self) -> Counts:
        counts = Counts()
        self.stack = ExitStack()
        for mode in (as_on_gpu(), _Methods(counts), _Operators(counts)):
            self.stack.enter_context(mode)
        return counts

    def __exit__(self, *error: Any) -> None:
        self.stack.close()


def count(function: Callable[[], object]) -> Counts:
    with counting() as counts:
        function()
    return counts


def uncounted() -> AbstractContextManager[Any]:
    """Leave out what the block runs."""
    return _disable_current_modes()
