import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close
from torchvision.ops import box_iou

from pisa_d2.ranking import ImageLayout, rank_negatives, repeated

NMS_THRESH = 0.5


class Image(NamedTuple):
    """The samples of an image."""

    boxes: Tensor
    scores: Tensor
    eligible: Tensor


def rank_one_by_one(image: Image) -> list[int]:
    """Compute Score-HLR one sample after the other, from the highest score down."""
    ious = box_iou(image.boxes, image.boxes).nan_to_num(0).tolist()
    scores = image.scores.tolist()
    clusters: list[list[int]] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if image.eligible[i]:
            for cluster in clusters:
                if ious[cluster[0]][i] > NMS_THRESH:
                    cluster.append(i)
                    break
            else:
                clusters.append([i])
    places = {i: place for cluster in clusters for place, i in enumerate(cluster)}
    sequence = sorted(places, key=lambda i: (places[i], -scores[i], i))
    last = max(len(sequence) - 1, 0)
    return [sequence.index(i) if i in places else last for i in range(len(scores))]


def layout_of(num_samples: Sequence[int]) -> ImageLayout:
    return ImageLayout(num_samples, torch.device("cpu"))


def rank(images: Sequence[Image]) -> list[Tensor]:
    """Rank the samples of each image of a batch."""
    num_samples = [len(image.scores) for image in images]
    batch = (torch.cat(parts) for parts in zip(*images, strict=True))
    return list(rank_negatives(*batch, layout_of(num_samples), NMS_THRESH).split(num_samples))


@st.composite
def images(draw: st.DrawFn) -> Image:
    """Draw crowded boxes, some without area, with many equal scores; often no sample at all."""
    start, length = st.integers(0, 3), st.integers(0, 3)
    score = st.sampled_from([0.1, 0.25, 0.5, 1.0])
    row = st.tuples(start, start, length, length, score, st.booleans())
    rows = tensor(draw(st.lists(row, max_size=8))).view(-1, 6)
    boxes = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1)
    return Image(boxes, rows[:, 4], rows[:, 5].bool())


def random_images(num_samples: Sequence[int]) -> list[Image]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for n in num_samples:
        corners, sizes = torch.rand(2, n, 2, generator=generator) * 30
        scores = torch.rand(n, generator=generator)
        result.append(Image(torch.cat([corners, corners + sizes], dim=1), scores, scores > 0.3))
    return result


@given(st.lists(images(), min_size=1, max_size=4))
def test_ranks_are_those_of_a_loop_over_the_samples_of_each_image(batch):
    expected = [tensor(rank_one_by_one(image), dtype=torch.int64) for image in batch]
    assert_close(rank(batch), expected)


def test_ranks_of_many_boxes_are_those_of_the_loop():
    batch = random_images([40, 0, 90])
    assert_close(rank(batch), [tensor(rank_one_by_one(i), dtype=torch.int64) for i in batch])


def test_samples_that_are_not_ranked_neither_suppress_others_nor_take_a_rank():
    boxes = tensor([[0.0, 0, 9, 9]]).expand(4, 4)
    image = Image(boxes, tensor([0.9, 0.8, 0.7, 0.6]), tensor([False, True, False, True]))
    assert_close(rank([image]), [tensor([1, 0, 1, 1])])


def test_samples_of_an_image_where_none_is_ranked_have_rank_0():
    first, second = random_images([5, 6])
    none = Image(first.boxes, first.scores, torch.zeros(5, dtype=torch.bool))
    assert_close(
        rank([none, second, none]), [torch.zeros(5).long(), *rank([second]), *rank([none])]
    )


@given(st.lists(images(), min_size=1, max_size=4))
def test_ranks_are_the_same_on_a_gpu_without_copies_to_the_host(as_on_gpu, batch):
    on_gpu = rank([Image(*map(as_on_gpu, image)) for image in batch])
    assert_close([ranks.as_subclass(Tensor) for ranks in on_gpu], rank(batch))


def test_what_is_not_finite_in_samples_that_are_not_ranked_disturbs_no_other():
    (image,) = random_images([6])
    broken = Image(
        torch.cat([image.boxes, torch.full((2, 4), math.nan), torch.full((1, 4), math.inf)]),
        torch.cat([image.scores, tensor([math.nan, 2.0, math.inf])]),
        torch.cat([image.eligible, torch.zeros(3, dtype=torch.bool)]),
    )
    assert_close(rank([broken])[0][:6], rank([image])[0])


def test_ranks_of_two_images_stay_when_14_images_join_them():
    batch = random_images([30, 25] + list(range(14, 28)))
    assert_close(rank(batch)[:2], rank(batch[:2]))


def test_ranks_do_not_depend_on_the_order_of_images():
    batch = random_images([12, 0, 30, 7])
    ranks = rank(batch)
    order = [2, 3, 0, 1]
    assert_close(rank([batch[i] for i in order]), [ranks[i] for i in order])


@pytest.mark.parametrize("num_samples", [[], [0], [0, 0, 0]])
def test_a_batch_without_samples_has_no_ranks(num_samples):
    none = torch.zeros(0)
    ranks = rank_negatives(none.view(0, 4), none, none.bool(), layout_of(num_samples), NMS_THRESH)
    assert_close(ranks, torch.zeros(0, dtype=torch.int64))


def test_ranks_carry_no_gradient():
    (image,) = random_images([6])
    boxes, scores = image.boxes.requires_grad_(), image.scores.requires_grad_()
    ranks = rank_negatives(boxes, scores, image.eligible, layout_of([6]), NMS_THRESH)
    assert not ranks.requires_grad


SIZES = [[], [0], [3], [2, 0, 1], [0, 0, 4], [2, 2]]


@pytest.mark.parametrize("num_samples", SIZES)
def test_each_sample_has_its_image_and_its_place_there(num_samples):
    layout = layout_of(num_samples)
    places = [(image, i) for image, n in enumerate(num_samples) for i in range(n)]
    expected = tensor(places, dtype=torch.int64).view(-1, 2)
    assert_close(layout.images, expected[:, 0])
    assert_close(layout.positions, expected[:, 1])


@pytest.mark.parametrize("num_samples", SIZES)
def test_padded_samples_come_back(num_samples):
    layout, size = layout_of(num_samples), sum(num_samples)
    values, boxes = torch.rand(size), torch.rand(size, 4)
    padded = layout.pad(values)
    assert padded.shape == (len(num_samples), max(num_samples, default=0))
    assert_close(padded.sum(), values.sum())
    assert_close(layout.unpad(padded), values)
    assert layout.pad(boxes).shape == (*padded.shape, 4)


@pytest.mark.parametrize("num_samples", SIZES)
def test_counts_are_of_the_selected_samples_of_each_image(num_samples):
    selected = torch.arange(sum(num_samples)) % 3 > 0
    expected = [int(part.sum()) for part in selected.split(num_samples)] if num_samples else []
    assert layout_of(num_samples).counts(selected).tolist() == expected


def test_numbers_are_repeated_as_often_as_asked_for():
    ours = repeated([5, 0, 2], [2, 1, 0], torch.device("cpu"))
    assert_close(ours, tensor([5, 5, 0]))
    assert len(repeated([], [], torch.device("cpu"))) == 0
