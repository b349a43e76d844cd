import os
import signal
from collections.abc import Callable, Iterator

# Set before torch is imported, and for the processes that tests start: several processes with
# several threads each would wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts tests in the background makes them ignore Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it patches)

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.utils.events import EventStorage
from helpers import copies_to_host
from hypothesis import settings
from torch import Tensor

from pisa_d2 import PROPOSAL_MATCHER_REGISTRY, PROPOSAL_SAMPLER_REGISTRY

# The same examples on every run and machine.
settings.register_profile("pisa_d2", derandomize=True, deadline=None, max_examples=50)
# Other examples on every run, unless pytest has a --hypothesis-seed: see `make fuzz`.
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.getenv("FUZZ_EXAMPLES", "20000"))
)
settings.load_profile(os.getenv("HYPOTHESIS_PROFILE", "pisa_d2"))


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory) -> Iterator[None]:
    """Keep cached image headers in a temporary folder, also for processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    """Forget what a test registers, also if it fails."""
    mappings = [
        DatasetCatalog.data,
        MetadataCatalog.data,
        PROPOSAL_MATCHER_REGISTRY._obj_map,
        PROPOSAL_SAMPLER_REGISTRY._obj_map,
        ROI_HEADS_REGISTRY._obj_map,
    ]
    before = [dict(mapping) for mapping in mappings]
    try:
        yield
    finally:
        for mapping, entries in zip(mappings, before, strict=True):
            mapping.clear()
            mapping.update(entries)


class TensorAsOnGPU(Tensor):
    is_cuda = True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        copies = copies_to_host(func, args)
        assert not copies, f"{func.__name__} would copy from the GPU to the host"
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture(scope="session")
def as_on_gpu() -> Callable[[Tensor], Tensor]:
    """
    Let a tensor on the CPU, and results computed from it, go the way of tensors on a GPU: a copy to
    the host fails.
    """
    return lambda t: t.as_subclass(TensorAsOnGPU)


@pytest.fixture
def storage() -> Iterator[EventStorage]:
    """The event storage into which models log while they train."""
    with EventStorage() as storage:
        yield storage
