import pytest
import torch
from torch import tensor

from pisa_d2.ranking import ImageLayout
from pisa_d2.samplers import Candidates, HardSampler, RandomSampler
from pisa_d2.samplers.together import Images, TogetherSampler, chooses_together

SIZES = [3, 0, 4]


def images(nums=(2, 1, 9), ranges=((0.0, 0.5),) * 3) -> Images:
    return Images(ImageLayout(SIZES, torch.device("cpu")), list(nums), list(ranges))


def candidates(ious) -> Candidates:
    ious = torch.as_tensor(ious)
    objects = torch.arange(len(ious))
    return Candidates(torch.zeros(len(ious), 4), ious, objects, objects)


class HighestIoU(TogetherSampler):
    """Sort by IoU, with a random number in addition, and rank the candidates by their place."""

    def draw(self, num, device):
        return (torch.rand(num, device=device),)

    def order(self, candidates, images, draws):
        assert draws.shape == candidates.ious.shape
        return images.order(candidates.ious.argsort(descending=True))

    def ranks_in_order(self, candidates, images):
        return images.layout.positions, images.layout.counts(candidates.ious >= 0)


def test_numbers_of_images_are_given_to_their_candidates():
    assert images().nums_on_device.tolist() == [2, 1, 9]
    assert images().repeat([5, 6, 7]).tolist() == [5, 5, 5, 7, 7, 7, 7]


def test_values_of_images_are_given_to_their_candidates_unless_all_are_the_same():
    assert images().spread([0.3, 0.3, 0.3]) == 0.3
    expected = tensor([0.1] * 3 + [0.3] * 4)
    assert torch.equal(images().spread([0.1, 0.2, 0.3]), expected)
    assert torch.equal(images().spread([tensor(0.1), 0.2, tensor(0.3)]), expected)
    same = [tensor(0.3)] * 3  # to compare tensors would take a copy to the host
    assert torch.equal(images().spread(same), torch.full((7,), 0.3))


def test_an_order_is_kept_in_each_image():
    order = tensor([6, 0, 4, 2, 5, 1, 3])
    assert images().order(order).tolist() == [0, 2, 1, 6, 4, 5, 3]


def test_candidates_of_the_lowest_ranks_come_first_in_each_image_and_ties_decide():
    ranks, ties = tensor([1, 0, 1, 9, 10**12, 0, 10**12]), torch.zeros(7, dtype=torch.float64)
    ties[0], ties[2], ties[4], ties[6] = 0.5, 0.25, 0.75, 0.5
    assert images().lowest_first(ranks, ties).tolist() == [1, 2, 0, 5, 3, 6, 4]


@pytest.mark.parametrize("num", [0, 2, 9])
def test_a_call_chooses_the_first_of_the_order_in_one_image(num):
    pool, sampler = candidates([0.2, 0.9, 0.5]), HighestIoU()
    chosen = sampler(pool, num)
    assert chosen.tolist() == [1, 2, 0][:num]
    ranks, n_max = sampler.ranks(pool, chosen, num)
    assert ranks.tolist() == [0, 1, 2][:num] and n_max == 3


def test_the_images_of_a_call_have_its_number_and_the_range_of_the_candidates():
    class Seeing(TogetherSampler):
        def order(self, candidates, images):
            assert images.nums == [2] and images.negative_ranges == [(0.0, 0.5)]
            assert images.layout.num_samples == [3]
            return torch.arange(3)

    assert Seeing()(candidates([0.1, 0.2, 0.3]), 2).tolist() == [0, 1]


def test_a_sampler_draws_and_ranks_nothing_unless_it_says_so():
    sampler = TogetherSampler()
    assert sampler.draw(3, torch.device("cpu")) == ()
    assert sampler.ranks(candidates([0.1, 0.2]), tensor([1]), 1) is None
    with pytest.raises(NotImplementedError):
        sampler(candidates([0.1, 0.2]), 1)


def test_samplers_choose_together_unless_a_subclass_has_its_own_call_or_ranks():
    class OwnCall(HardSampler):
        def __call__(self, candidates, num):
            return super().__call__(candidates, num)

    class OwnRanks(HardSampler):
        def ranks(self, candidates, chosen, num):
            return None

    class OwnOrder(HardSampler):
        def order(self, candidates, images):
            return images.order(torch.arange(len(candidates)))

    chooses = [chooses_together(s) for s in (HighestIoU(), HardSampler(), OwnOrder())]
    assert chooses == [True] * 3
    assert not any(chooses_together(s) for s in (OwnCall(), OwnRanks(), RandomSampler()))
