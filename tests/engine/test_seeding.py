import random

import numpy as np
import pytest
import torch

from pisa_d2.engine.seeding import derive_seed, seeded


def draw() -> tuple[float, float, float]:
    """Draw a number from each global generator."""
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeds_depend_on_every_number_of_the_key_and_fit_32_bits():
    keys = [(seed, step) for seed in range(30) for step in range(30)]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [derive_seed(*key) for key in keys]
    assert max(seeds) > 2**31 > min(seeds)


def test_draws_inside_depend_on_the_key_alone():
    inside = []
    for before, key in [(1, (3, 4)), (2, (3, 4)), (2, (3, 5))]:
        random.seed(before)
        np.random.seed(before)
        torch.manual_seed(before)
        with seeded(*key):
            inside.append(draw())
    assert inside[0] == inside[1]
    assert all(a != b for a, b in zip(inside[1], inside[2], strict=True))


def test_draws_afterwards_are_as_if_nothing_had_been_drawn_even_after_an_error():
    def reset() -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    reset()
    expected = draw()
    reset()
    with seeded(1, 2):
        draw()
    assert draw() == expected
    reset()
    with pytest.raises(KeyError), seeded(1, 2):
        draw()
        raise KeyError
    assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_seeded_where_it_is_named():
    device = torch.device("cuda")
    drawn = []
    for before in (1, 2):
        torch.cuda.manual_seed(before)
        expected = torch.rand(1, device=device)
        torch.cuda.manual_seed(before)
        with seeded(3, 4, device=device):
            drawn.append((torch.rand(1), torch.rand(1, device=device)))
        assert torch.rand(1, device=device) == expected
    assert drawn[0] == drawn[1]
