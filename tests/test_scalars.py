import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import random_batch, with_regions
from torch import tensor

from pisa_d2.scalars import is_time, log_ignored, log_negatives, log_positives


def logged(function, *args, iteration=19):
    """Collect the scalars that a function logs in an iteration, without "pisa/"."""
    with EventStorage(iteration) as storage:
        function(*args)
        return {name.removeprefix("pisa/"): value for name, (value, _) in storage.latest().items()}


def test_every_twentieth_iteration_is_logged_as_detectron2_writes_them():
    with EventStorage() as storage:
        times = []
        for _ in range(60):
            if is_time():
                times.append(storage.iter)
            storage.step()
    assert times == [19, 39, 59]


POSITIVES = (
    tensor([0.9, 0.6, 0.7, 0.8]),  # IoU
    tensor([3, 3, 5, 5]),  # objects
    tensor([0.8, 0.1, 0.4, 0.5]),  # probabilities
    tensor([2.0, 0.0, 0.5, 1.5]),  # weights
)


def test_scalars_of_positives_are_means_and_weighted_means():
    assert logged(log_positives, *POSITIVES) == pytest.approx(
        {
            "positive_iou": 0.75,
            "positive_iou_weighted": (2 * 0.9 + 0.5 * 0.7 + 1.5 * 0.8) / 4,
            "positive_prob": 0.45,
            "positive_prob_weighted": (2 * 0.8 + 0.5 * 0.4 + 1.5 * 0.5) / 4,
            "first_rank_share": 2 / 4,
            "first_rank_weight": (2 + 1.5) / 4,
        }
    )


NEGATIVES = (
    tensor([0.5, 0.9, 0.2, 0.1]),  # scores
    tensor([True, False, True, True]),  # negative
    tensor([True, False, True, False]),  # ranked
    tensor([1.5, 7.0, 1.0, 0.5]),  # weights
)


def test_scalars_of_negatives_leave_positives_out():
    assert logged(log_negatives, *NEGATIVES, 2) == pytest.approx(
        {
            "negative_score": 0.8 / 3,
            "negative_score_weighted": (1.5 * 0.5 + 1.0 * 0.2 + 0.5 * 0.1) / 3,
            "ranked_negatives": 1.0,
            "ranked_weight": 2.5 / 3,
        }
    )


def test_a_mean_of_no_samples_is_not_logged():
    none = torch.zeros(4, dtype=torch.bool)
    assert logged(log_negatives, NEGATIVES[0], none, none, NEGATIVES[3], 2) == {
        "ranked_negatives": 0.0
    }
    assert logged(log_positives, *(values[:0] for values in POSITIVES)) == {}
    assert logged(log_negatives, *(values[:0] for values in NEGATIVES), 2) == {}


def test_ignored_boxes_inside_regions_are_counted_per_image():
    boxes = tensor([[0.0, 0, 10, 10], [2, 2, 8, 8], [50, 50, 60, 60]])
    batch = with_regions(random_batch([1, 1]), [[0, 0, 20, 20]], [])
    targets = [sample["instances"] for sample in batch]
    # In the first image, one ignored box lies inside the region and one outside it.
    labels = [tensor([-1, 2, -1]), tensor([-1, -1, -1])]
    scalars = logged(log_ignored, "anchors", labels, [boxes, boxes], targets, 0.5)
    assert scalars == {"ignored_anchors": 0.5}


def test_other_iterations_log_nothing():
    targets = [sample["instances"] for sample in random_batch([1])]
    labels, boxes = [tensor([-1])], [Boxes(tensor([[0.0, 0, 1, 1]])).tensor]
    for iteration in (0, 18, 20):
        assert logged(log_positives, *POSITIVES, iteration=iteration) == {}
        assert logged(log_negatives, *NEGATIVES, 2, iteration=iteration) == {}
        args = ("anchors", labels, boxes, targets, 0.5)
        assert logged(log_ignored, *args, iteration=iteration) == {}
