"""Choosing in all images at once, compared with a loop over the images."""

import itertools

import pytest
import torch
from helpers import random_boxes

from pisa_d2.devices import as_on_gpu
from pisa_d2.reweighting import importance
from pisa_d2.samplers import (
    Candidates,
    Choice,
    HardSampler,
    InstanceBalancedSampler,
    IoUBalancedSampler,
    IoUHLRSampler,
    PairSampler,
    Predictions,
    ProposalSampler,
    Quota,
    RandomSampler,
    ScoreHLRSampler,
)
from pisa_d2.samplers.candidates import is_positive

NUM_CLASSES = 3


class LargestFirst(ProposalSampler):
    """A sampler that chooses in one image at a time."""

    def __call__(self, candidates, num):
        width, height = (candidates.boxes[:, 2:] - candidates.boxes[:, :2]).T
        return (width * height).argsort(descending=True)[:num]


class BackwardHard(HardSampler):
    """A subclass that does not choose together, of a sampler that does."""

    def __call__(self, candidates, num):
        return super().__call__(candidates, num).flip(0)


POSITIVE = [RandomSampler(), InstanceBalancedSampler(), HardSampler(), IoUHLRSampler()]
POSITIVE += [LargestFirst(), BackwardHard()]
NEGATIVE = [
    RandomSampler(),
    IoUBalancedSampler(),
    IoUBalancedSampler(num_bins=4, floor_thresh=0.1, floor_fraction=0.3),
    HardSampler(),
    ScoreHLRSampler(score_thresh=0.3),
    LargestFirst(),
]


def batch_of(*sizes, as_tensors=False):
    generator = torch.Generator().manual_seed(0)
    batch = []
    for image, size in enumerate(sizes):
        classes = torch.randint(-1, NUM_CLASSES + 1, (size,), generator=generator)
        classes[::2] = NUM_CLASSES
        values = torch.rand(5, size, generator=generator)
        predictions = Predictions(*values[:3], random_boxes(size, generator), values[3])
        ends = (0.0, 0.4 + 0.1 * image)
        batch.append(
            Candidates(
                random_boxes(size, generator),
                torch.where(classes == NUM_CLASSES, values[4] / 2, values[4]),
                torch.randint(5, (size,), generator=generator),
                classes,
                predictions,
                tuple(map(torch.tensor, ends)) if as_tensors else (0.0, 0.5),
            )
        )
    return batch


def choose_one_by_one(pair, batch, quota):
    choices = []
    for candidates in batch:
        positives = is_positive(candidates.classes, NUM_CLASSES).nonzero()[:, 0]
        negatives = (candidates.classes == NUM_CLASSES).nonzero()[:, 0]
        most = int(quota.num_per_image * quota.positive_fraction)
        positives = positives[pair.positive(candidates.select(positives), most)]
        num = quota.num_per_image - len(positives)
        of_kind = candidates.select(negatives)
        chosen = pair.negative(of_kind, num)
        ranks = pair.negative.ranks(of_kind, chosen, num)
        weights = None if ranks is None else importance(*ranks)
        choices.append(Choice(positives, negatives[chosen], weights))
    return choices


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("sizes", [(40, 0, 60), (50, 50), (30,), (0, 0)])
def test_the_choice_is_that_of_a_loop_over_the_images(sizes, as_tensors):
    batch, quota = batch_of(*sizes, as_tensors=as_tensors), Quota(24, 0.25, NUM_CLASSES)
    for positive, negative in itertools.product(POSITIVE, NEGATIVE):
        pair = PairSampler(positive=positive, negative=negative)
        torch.manual_seed(0)
        expected = choose_one_by_one(pair, batch, quota)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        ours = pair(batch, quota)
        assert torch.equal(torch.get_rng_state(), state), "other random numbers are drawn"
        torch.testing.assert_close(ours, expected, msg=f"{positive} {negative}")
        torch.manual_seed(0)
        with as_on_gpu():
            torch.testing.assert_close(pair(batch, quota), expected)


def test_no_images_give_no_choices():
    pair = PairSampler(positive=HardSampler(), negative=ScoreHLRSampler())
    assert pair([], Quota(24, 0.25, NUM_CLASSES)) == []


def test_predictions_are_those_that_either_sampler_asks_for():
    pair = PairSampler(positive=HardSampler(), negative=ScoreHLRSampler())
    assert pair.needs_predictions == ("cls_losses", "scores", "boxes")
    assert not PairSampler(positive=RandomSampler(), negative=LargestFirst()).needs_predictions


def test_predictions_that_there_are_not_are_refused():
    class Asking(LargestFirst):
        needs_predictions = ("losses",)

    with pytest.raises(ValueError, match="needs_predictions = .*cls_losses.*ious"):
        PairSampler(positive=Asking(), negative=RandomSampler())
