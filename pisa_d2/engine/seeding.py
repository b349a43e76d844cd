"""Random numbers that depend on a key, such as (seed, iteration), and on nothing drawn before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """
    A seed in [0, 2**32) for a key of integers, none negative. Keys of one length that differ in
    any number give seeds that have nothing to do with one another.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """
    What is drawn inside, on the CPU, depends on ``key`` alone, and what is drawn afterwards is as
    if nothing had been drawn: for the global generators of Python, NumPy and torch.
    """
    seed = derive_seed(*key)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
