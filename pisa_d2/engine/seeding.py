"""Random numbers that depend only on a key, such as (seed, iteration), not on earlier draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """
    Derive a seed in [0, 2**32) from a key of integers, none negative. Keys of the same length that
    differ in any number give unrelated seeds.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """
    Make draws inside depend only on ``key``, and draws afterwards continue as if nothing had been
    drawn: with the global generators of Python, NumPy and torch.

    Args:
        device: a GPU whose generator is seeded as well, in addition to the CPU's generators.
    """
    seed = derive_seed(*key)
    states = random.getstate(), np.random.get_state()
    gpus = [] if device is None or device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
