import os
import signal
from collections.abc import Callable, Iterator

# Before torch is imported, and for the processes that tests start: several processes of several
# threads each would wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts tests in the background has them ignore Ctrl-C, which some of them send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pisa_d2  # noqa: F401  # isort: skip  (Detectron2 0.6 cannot be imported before it)

import pytest
from detectron2.utils.events import EventStorage
from helpers import copies_to_host
from hypothesis import settings
from torch import Tensor

# The same examples on every run and machine.
settings.register_profile("pisa_d2", derandomize=True, deadline=None, max_examples=100)
# Others on every run, unless pytest is given a --hypothesis-seed: see `make fuzz`.
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.getenv("FUZZ_EXAMPLES", "20000"))
)
settings.load_profile(os.getenv("HYPOTHESIS_PROFILE", "pisa_d2"))


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory) -> Iterator[None]:
    """What is remembered of images, also by the processes that tests start, goes with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
    Lets a tensor of the CPU, and what is computed from it, go the way of those on a GPU: what
    would copy it to the host fails.
    """
    return lambda t: t.as_subclass(TensorAsOnGPU)


@pytest.fixture
def storage() -> Iterator[EventStorage]:
    """What models log into while they train."""
    with EventStorage() as storage:
        yield storage
