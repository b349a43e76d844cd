import copy
import pickle

import pytest
import torch
from helpers import random_boxes

from pisa_d2.samplers import Candidates, Choice, Predictions
from pisa_d2.samplers.candidates import Joined, is_positive, needed_predictions

FIELDS = ["boxes", "ious", "objects", "classes"]


def candidates_of(size, seed=0, predictions=True):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5, size, generator=generator)
    made = Predictions(*values[:3], random_boxes(size, generator), values[3])
    objects = torch.randint(5, (size,), generator=generator)
    boxes = random_boxes(size, generator)
    return Candidates(
        *(boxes, values[4], objects, objects % 3),
        made if predictions else None,
        negative_range=(0.1, 0.4),
    )


def assert_rows(some, whole, rows):
    """Check that ``some`` are these rows of ``whole``."""
    assert len(some) == len(rows) and some.device == whole.device
    for name in FIELDS:
        assert torch.equal(getattr(some, name), getattr(whole, name)[rows])
    if whole.predictions is None:
        assert some.predictions is None
    else:
        for name in Predictions.FIELDS:
            ours, theirs = (getattr(c.predictions, name) for c in (some, whole))
            assert torch.equal(ours, theirs[rows])


@pytest.mark.parametrize("predictions", [True, False])
@pytest.mark.parametrize("rows", [[], [3], [4, 0, 4], [5, 4, 3, 2, 1, 0]])
def test_selected_candidates_are_the_rows_of_every_field(rows, predictions):
    whole = candidates_of(6, predictions=predictions)
    some = whole.select(torch.tensor(rows, dtype=torch.int64))
    assert_rows(some, whole, rows)
    assert some.negative_range == (0.1, 0.4)
    other = torch.arange(len(rows)).flip(0)
    assert_rows(some.select(other), whole, rows[::-1])


@pytest.mark.parametrize("predictions", [True, False])
def test_joined_candidates_are_those_of_one_image_after_the_other(predictions):
    batch = [candidates_of(size, size, predictions) for size in (4, 0, 3)]
    whole = Joined(batch)
    assert len(whole) == 7
    assert_rows(whole.select(torch.arange(4)), batch[0], list(range(4)))
    assert_rows(whole.select(torch.arange(4, 7)), batch[2], list(range(3)))
    assert_rows(whole, whole, list(range(7)))


def test_selected_candidates_can_be_copied():
    some = candidates_of(6).select(torch.tensor([4, 1]))
    assert_rows(copy.copy(some), some, [0, 1])


def test_the_same_candidates_with_predictions_keep_all_else():
    given = candidates_of(6, predictions=False)
    predictions = Predictions(scores=torch.rand(6))
    with_predictions = given.with_predictions(predictions)
    assert with_predictions.predictions is predictions and given.predictions is None
    assert with_predictions.negative_range == (0.1, 0.4)
    assert all(getattr(with_predictions, name) is getattr(given, name) for name in FIELDS)


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (True, Predictions.FIELDS),
        (False, ()),
        ((), ()),
        (None, ()),
        (["ious", "cls_losses"], ("cls_losses", "ious")),
        ({"boxes"}, ("boxes",)),
        (("scores", "scores"), ("scores",)),
    ],
)
def test_needed_predictions_are_named_once_in_the_order_of_the_fields(needs, expected):
    assert needed_predictions(needs) == expected


@pytest.mark.parametrize("needs", [("losses",), "scores", ["boxes", "cls_loss"]])
def test_predictions_that_there_are_not_are_refused(needs):
    match = r"needs_predictions = .* is not allowed: .*cls_losses.*ious"
    with pytest.raises(ValueError, match=match):
        needed_predictions(needs)


def test_predictions_have_the_attributes_that_were_given():
    scores = torch.rand(3)
    predictions = Predictions(scores=scores)
    assert predictions.scores is scores and vars(predictions).keys() == {"scores"}
    with pytest.raises(AttributeError, match="^unheard$"):
        _ = predictions.unheard
    restored = pickle.loads(pickle.dumps(predictions))
    assert torch.equal(restored.scores, scores)


def test_positives_are_neither_ignored_nor_background():
    classes = torch.tensor([-1, 0, 2, 3, 4])
    assert is_positive(classes, num_classes=3).tolist() == [False, True, True, False, False]


def test_the_indices_of_a_choice_are_those_of_the_positives_then_of_the_negatives():
    choice = Choice(torch.tensor([5, 2]), torch.tensor([0, 7, 3]))
    assert choice.indices.tolist() == [5, 2, 0, 7, 3]
    assert choice.negative_importance is None


def test_rows_of_candidates_are_gathered_when_they_are_asked_for():
    class Counted(torch.Tensor):
        gathered = 0

        def __getitem__(self, rows):
            Counted.gathered += 1
            return torch.Tensor(self)[rows]

    ious = torch.rand(6).as_subclass(Counted)
    image = Candidates(torch.rand(6, 4), ious, torch.arange(6), torch.arange(6), None, (0.1, 0.4))
    rows = image.select(torch.tensor([4, 1]))
    assert len(rows) == 2 and Counted.gathered == 0
    assert torch.equal(rows.ious, torch.Tensor(ious)[[4, 1]])
    assert rows.ious is rows.ious and Counted.gathered == 1
    assert rows.predictions is None and rows.negative_range == (0.1, 0.4)
    assert rows.select(torch.tensor([1])).objects.tolist() == [1]


def test_predictions_that_nobody_asked_for_are_an_error():
    candidates = candidates_of(10)
    candidates.predictions = Predictions(scores=torch.rand(10))
    for some in (candidates, candidates.select(torch.arange(3)), Joined([candidates] * 2)):
        assert some.predictions.scores.ndim == 1
        with pytest.raises(AttributeError, match="no boxes: add it to the sampler"):
            _ = some.predictions.boxes


def test_the_range_of_joined_images_is_asked_of_each():
    with pytest.raises(AttributeError, match="differs between images"):
        _ = Joined([candidates_of(3), candidates_of(4)]).negative_range
