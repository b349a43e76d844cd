import pytest
import torch
from helpers import random_boxes
from oracles import slow_negative_weights, slow_positive_weights
from torch import tensor
from torch.testing import assert_close

from pisa_d2.hlr import hierarchical_local_rank, nms_groups
from pisa_d2.isr import negative_weights, positive_weights, weights_of_positive_ranks
from pisa_d2.ranking import ImageLayout, rank_negatives
from pisa_d2.reweighting import importance


def positives(num: int, num_objects: int = 6, num_classes: int = 3, seed: int = 0):
    """Draw IoU, object, class and loss of positives; some IoU are equal."""
    generator = torch.Generator().manual_seed(seed)
    ious = torch.randint(5, 10, (num,), generator=generator) / 10
    objects = torch.randint(num_objects, (num,), generator=generator)
    classes = torch.randint(num_classes, (num_objects,), generator=generator)[objects]
    return ious, objects, classes, 0.1 + torch.rand(num, generator=generator)


@pytest.mark.parametrize(("gamma", "beta"), [(2.0, 0.0), (0.5, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_positive_weights_are_those_of_the_loop(gamma, beta, seed):
    samples = positives(40, seed=seed)
    ious, *others = (values.tolist() for values in samples)
    expected = slow_positive_weights(dict(enumerate(ious)), *others, gamma, beta)
    weights = positive_weights(*samples, gamma=gamma, beta=beta)
    assert_close(weights, tensor([expected[i] for i in range(40)]))


def test_positive_weights_keep_the_sum_of_the_losses_and_change_each_of_them():
    *samples, losses = positives(40)
    weights = positive_weights(*samples, losses)
    assert_close((weights * losses).sum(), losses.sum())
    assert weights.max() > 1.5 and weights.min() < 0.5


def test_ranks_are_divided_by_the_number_of_the_largest_class_or_of_each_class():
    ious = tensor([0.9, 0.8, 0.9, 0.7, 0.6])
    objects, classes = tensor([0, 0, 1, 1, 1]), tensor([5, 5, 2, 2, 2])
    args = {"losses": torch.ones(5), "gamma": 1.0, "beta": 0.0}
    shared = tensor([3, 2, 3, 2, 1]) / 3
    weights = positive_weights(ious, objects, classes, **args)
    assert_close(weights, shared * 5 / shared.sum())
    own = tensor([1, 1 / 2, 1, 2 / 3, 1 / 3])
    weights = positive_weights(ious, objects, classes, **args, n_max="class")
    assert_close(weights, own * 5 / own.sum())


def test_no_positives_have_no_weights():
    none = torch.zeros(0, dtype=torch.int64)
    assert positive_weights(torch.zeros(0), none, none, torch.zeros(0)).shape == (0,)


def test_ranks_that_are_known_give_the_weights_that_ranking_gives():
    ious, objects, classes, losses = positives(30)
    ranks = hierarchical_local_rank(ious, objects, classes)
    weights = weights_of_positive_ranks(ranks, classes, losses, gamma=2.0, beta=0.1, n_max="shared")
    assert torch.equal(weights, positive_weights(ious, objects, classes, losses, beta=0.1))


@pytest.mark.parametrize(("gamma", "beta"), [(0.5, 0.0), (2.0, 0.4)])
def test_negative_weights_are_those_of_the_loop_and_positives_count_for_nothing(gamma, beta):
    generator = torch.Generator().manual_seed(0)
    corners = 40 * torch.rand(20, 2, generator=generator)
    boxes = torch.cat([corners, corners + 20], dim=1)
    scores, losses = torch.rand(2, 20, generator=generator)
    negative = torch.arange(20) % 4 != 0
    rows = negative.nonzero()[:, 0]
    expected = slow_negative_weights(
        [rows.tolist()],
        boxes.tolist(),
        scores.tolist(),
        losses.tolist(),
        gamma=gamma,
        beta=beta,
        score_thresh=0.0,
        nms_thresh=0.5,
    )
    groups = nms_groups(boxes[rows], scores[rows], 0.5)
    ranks = hierarchical_local_rank(scores[rows], groups)
    of_all = torch.zeros(20)
    of_all[rows] = importance(ranks, len(rows))
    weights = negative_weights(of_all, negative, losses, gamma=gamma, beta=beta)
    assert_close(weights[rows], tensor([expected[i] for i in rows.tolist()]))
    assert_close((weights * losses)[rows].sum(), losses[rows].sum())


def test_weights_are_made_without_copies_to_the_host(as_on_gpu):
    generator = torch.Generator().manual_seed(0)
    ious, losses = torch.rand(2, 40, generator=generator)
    objects, classes = torch.randint(6, (40,), generator=generator), torch.arange(40) % 3
    weights = positive_weights(as_on_gpu(ious), objects, classes, losses)
    expected = positive_weights(ious, objects, classes, losses)
    torch.testing.assert_close(weights.as_subclass(torch.Tensor), expected)

    boxes, negative = random_boxes(40, generator), torch.arange(40) % 4 > 0

    def weigh(scores, boxes, negative):
        layout = ImageLayout([15, 0, 25], torch.device("cpu"))
        ranks = rank_negatives(boxes, scores, negative & (scores > 0.05), layout, 0.5)
        n_max = layout.counts(negative).max()
        return negative_weights(importance(ranks, n_max), negative, losses)

    weights = weigh(as_on_gpu(ious), as_on_gpu(boxes), as_on_gpu(negative))
    expected = weigh(ious, boxes, negative)
    torch.testing.assert_close(weights.as_subclass(torch.Tensor), expected)
