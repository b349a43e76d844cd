"""
Patches that let Detectron2 0.6 (2021) run with current NumPy and Pillow, and without its compiled
operators.

This module is imported before any part of Detectron2. Each patch is applied only if the problem is
present; a Detectron2 that needs none is left untouched.
"""

import functools
import importlib.util
import random
import sys
import types
import warnings
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.cocoeval import COCOeval

# Aliases of the builtins, removed in NumPy 1.24 (``bool`` is back since 2.0 as its own scalar).
_NUMPY_ALIASES = {"bool": bool, "float": float, "int": int, "object": object, "str": str}


class _MissingOperators(types.ModuleType):
    """A placeholder for ``detectron2._C`` that fails on the first use of an operator."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"detectron2._C.{name} is not available: this Detectron2 was installed without its "
            "compiled operators. Deformable convolution and rotated boxes need them; build "
            "Detectron2 from source to use these."
        )


def _add_removed_names() -> None:
    if not hasattr(Image, "LINEAR"):  # removed in Pillow 10
        Image.LINEAR = Image.Resampling.BILINEAR  # type: ignore[attr-defined]
    for name, builtin in _NUMPY_ALIASES.items():
        if name not in vars(np):
            setattr(np, name, builtin)


def _import_without_operators() -> None:
    # Three layers of 0.6 import the operators at the top of their modules and keep the placeholder.
    # It is removed again, so that a later import of the operators fails as it should.
    sys.modules["detectron2._C"] = _MissingOperators("detectron2._C")
    try:
        import detectron2.layers  # noqa: F401
    finally:
        del sys.modules["detectron2._C"]
    # One operator is a faster COCOeval; pycocotools' own gives the same numbers.
    fast_eval_api = types.ModuleType("detectron2.evaluation.fast_eval_api")
    fast_eval_api.COCOeval_opt = COCOeval  # type: ignore[attr-defined]
    sys.modules[fast_eval_api.__name__] = fast_eval_api


def _export_without_caffe2() -> None:
    # The package's first import is the export to Caffe2, which torch no longer has. TorchScript
    # does not need it.
    api = types.ModuleType("detectron2.export.api")
    api.__all__ = []  # type: ignore[attr-defined]
    sys.modules[api.__name__] = api


def _let_retinanet_have_group_norm() -> None:
    from detectron2.modeling.meta_arch import retinanet

    # 0.6 builds a norm of one channel to find out its kind. GroupNorm has 32 groups, and current
    # torch refuses to build it with fewer channels.
    get_norm = retinanet.get_norm
    try:
        get_norm("GN", 1)
    except ValueError:
        retinanet.get_norm = lambda norm, channels: get_norm(
            norm, 32 if channels == 1 else channels
        )


class _RandomOfSets(random.Random):
    """A generator that can also sample from sets, as in Python up to 3.10."""

    def sample(self, population: Any, k: int) -> list:  # type: ignore[override]
        return super().sample(list(population), k)


def _let_mappers_leave_out_samples() -> None:
    # If a mapper returns None, 0.6 draws another sample from a set.
    from detectron2.data.common import MapDataset

    init = MapDataset.__init__
    if hasattr(init, "__wrapped__"):  # patched before
        return

    @functools.wraps(init)
    def init_with_random_of_sets(self: Any, dataset: Any, map_func: Any) -> None:
        init(self, dataset, map_func)
        self._rng = _RandomOfSets(42)

    MapDataset.__init__ = init_with_random_of_sets


def _patch() -> None:
    from detectron2.utils import comm

    is_release = not hasattr(comm, "create_local_process_group")  # 0.6
    if is_release:
        _add_removed_names()
    try:
        import detectron2.layers  # noqa: F401
    except ImportError:
        if importlib.util.find_spec("detectron2._C") is not None:
            raise
        _import_without_operators()
    if is_release:
        _let_retinanet_have_group_norm()
    if is_release and any(importlib.util.find_spec(name) is None for name in ("caffe2", "onnx")):
        _export_without_caffe2()
    if is_release and sys.version_info >= (3, 11):
        _let_mappers_leave_out_samples()


def prepare_detectron2() -> None:
    """
    Make ``import detectron2`` work.

    Raises:
        ImportError: Detectron2 is not installed. The message says how to install it.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(
            "pisa_d2 needs Detectron2 (0.6 or newer), which is not installed. Build it from its "
            "repository, see https://detectron2.readthedocs.io/tutorials/install.html, or run "
            "`make setup` in a clone of pisa_d2 for a complete environment without compiling."
        )
    with warnings.catch_warnings():
        # Raised by Detectron2's and fvcore's own code on every start; users cannot act on it.
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        _patch()
        import detectron2.modeling  # noqa: F401


prepare_detectron2()
