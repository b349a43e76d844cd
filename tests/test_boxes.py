import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import slow_iou, slow_nms_groups
from torch import Tensor, tensor
from torch.testing import assert_close
from torchvision.ops import nms

from pisa_d2 import boxes as module
from pisa_d2.boxes import box_iou, nms_groups
from pisa_d2.devices import as_on_gpu as as_on_gpu_path

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Few different numbers, so that ties are the rule.
VALUES = st.sampled_from([math.nan, math.inf, -math.inf, -2.0, -0.0, 0.0, 0.25, 0.5, 1.0])
INT64 = st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)
# Dyadic, so that rounding cannot move an IoU across the threshold.
THRESHOLDS = st.sampled_from([0.0, 0.25, 0.5, 0.75])


@st.composite
def detections(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Draw boxes, scores and partitions, including boxes without area and NaN."""
    start, length = st.integers(0, 4), st.integers(0, 4)
    rows = draw(
        st.lists(
            st.tuples(
                *(start, start, length, length),
                *(VALUES, st.sampled_from([-5, 3])),
                st.sampled_from([None] * 8 + [0, 1, 2, 3]),
            ),
            max_size=10,
        )
    )
    boxes = torch.zeros(len(rows), 4, dtype=draw(st.sampled_from(DTYPES)))
    for box, (x, y, width, height, _, _, broken) in zip(boxes, rows, strict=True):
        box[:] = tensor([x, y, x + width, y + height])
        if broken is not None:
            box[broken] = math.nan
    scores = tensor([row[4] for row in rows], dtype=draw(st.sampled_from(DTYPES)))
    return boxes, scores, tensor([row[5] for row in rows], dtype=torch.int64)


def random_boxes(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make crowded boxes with scores, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * 60
    sizes = torch.rand(*shape, 2, generator=generator) * 30 + 10
    scores = torch.randint(0, 200, shape, generator=generator) / 200
    return torch.cat([corners, corners + sizes], dim=-1), scores


@pytest.fixture(params=[nullcontext, as_on_gpu_path], ids=["cpu", "gpu"])
def on_each_path(request):
    with request.param():
        yield


def row_of_boxes(length: int) -> Tensor:
    """Make boxes that overlap their neighbours with IoU 3/5, and the next ones with 1/3."""
    x = torch.arange(length, dtype=torch.float32) * 2
    return torch.stack([x, torch.zeros(length), x + 8, torch.ones(length)], dim=1)


@given(detections())
def test_iou_of_all_pairs_is_that_of_a_loop(detection):
    boxes = detection[0]
    ious = box_iou(boxes[:, None], boxes[None])
    expected = [slow_iou(a, b) for a in boxes.tolist() for b in boxes.tolist()]
    assert ious.dtype == torch.promote_types(boxes.dtype, torch.float32)
    assert_close(ious, tensor(expected, dtype=ious.dtype).view(ious.shape), equal_nan=True)
    assert_close(box_iou(boxes, boxes), ious.diagonal(), equal_nan=True)


def test_iou_of_half_precision_boxes_does_not_overflow():
    boxes = tensor([[0, 0, 1000, 1000], [0, 0, 1000, 500]], dtype=torch.float16)
    assert_close(box_iou(boxes[0], boxes[1]), tensor(0.5))


@given(detections(), THRESHOLDS)
def test_nms_groups_are_those_of_a_greedy_loop(detection, threshold):
    boxes, scores, partitions = detection
    expected = slow_nms_groups(
        boxes.tolist(), scores.tolist(), threshold, partitions=partitions.tolist()
    )
    groups = nms_groups(boxes, scores, threshold, partitions)
    assert_close(groups, tensor(expected, dtype=torch.int64))


@given(detections(), THRESHOLDS)
def test_nms_groups_without_partitions_are_those_of_one_partition(detection, threshold):
    boxes, scores, partitions = detection
    expected = nms_groups(boxes, scores, threshold, torch.full_like(partitions, -3))
    assert_close(nms_groups(boxes, scores, threshold), expected)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_that_head_a_group_are_those_that_torchvision_keeps(seed):
    boxes, scores = random_boxes(300, seed=seed)
    heads = nms_groups(boxes, scores, 0.5)
    assert_close(heads.unique(), nms(boxes, scores, 0.5).sort().values)
    assert_close(heads[heads], heads)


@pytest.mark.parametrize("step", [1, 7, 39, 40, 64])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_boxes_that_are_gone_through_in_parts_have_the_groups_of_all_at_once(
    monkeypatch, as_on_gpu, leading, step
):
    boxes, scores = random_boxes(*leading, 40, seed=0)
    partitions = torch.randint(0, 2, scores.shape, generator=torch.Generator().manual_seed(0))
    at_once = nms_groups(boxes, scores, 0.3, partitions)
    for name in ("_MAX_PAIRS", "_MAX_PAIRS_ON_GPU"):
        monkeypatch.setattr(module, name, step * scores.numel())
    monkeypatch.setattr(module, "_FEWEST_BOXES", 1)
    assert_close(nms_groups(boxes, scores, 0.3, partitions), at_once)
    groups = nms_groups(as_on_gpu(boxes), as_on_gpu(scores), 0.3, as_on_gpu(partitions))
    assert_close(groups.as_subclass(Tensor), at_once)
    assert not torch.equal(at_once, torch.arange(40).expand_as(at_once))


def test_no_more_pairs_than_the_bound_are_compared_at_a_time(monkeypatch):
    compared = []

    def counting(boxes1, boxes2):
        compared.append(box_iou(boxes1, boxes2))
        return compared[-1]

    monkeypatch.setattr(module, "box_iou", counting)
    nms_groups(*random_boxes(3000, seed=0), 0.5)
    assert sum(ious.numel() for ious in compared) > 3000**2 / 2
    assert max(ious.numel() for ious in compared) <= module._MAX_PAIRS


@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,), (2, 0)])
def test_nms_groups_of_leading_dimensions_are_those_of_each_image_alone(leading):
    boxes, scores = random_boxes(*leading, 40, seed=0)
    partitions = torch.randint(0, 3, scores.shape, generator=torch.Generator().manual_seed(0))
    groups = nms_groups(boxes, scores, 0.3, partitions)
    assert groups.shape == scores.shape
    for index in product(*map(range, leading)):
        alone = nms_groups(boxes[index], scores[index], 0.3, partitions[index])
        assert_close(groups[index], alone)


def test_boxes_without_area_or_with_nan_are_alone():
    boxes = tensor([[0, 0, 9, 9], [4, 4, 4, 8], [4, 4, 4, 8], [9, 9, 0, 0], [0, 0, 9, math.nan]])
    groups = nms_groups(boxes, tensor([0.1, 0.9, 0.8, 0.7, 0.6]), 0.0)
    assert_close(groups, torch.arange(5))


def test_a_box_of_nan_score_heads_no_group_of_better_boxes():
    boxes = tensor([[0.0, 0, 9, 9]]).expand(3, 4)
    assert_close(nms_groups(boxes, tensor([math.nan, -math.inf, 0.1]), 0.5), tensor([2, 2, 2]))


def test_the_lowest_index_of_many_equal_boxes_heads_their_group():
    boxes, scores = tensor([[0.0, 0, 9, 9]]).expand(600, 4), torch.arange(600) % 3 / 3
    assert_close(nms_groups(boxes, scores, 0.5), torch.full((600,), 2))


def test_boxes_at_the_threshold_stay_apart():
    boxes = tensor([[0.0, 0, 4, 4], [0.0, 0, 4, 2]])
    assert_close(nms_groups(boxes, tensor([0.9, 0.8]), 0.5), tensor([0, 1]))
    assert_close(nms_groups(boxes, tensor([0.9, 0.8]), 0.49), tensor([0, 0]))


def test_a_box_that_several_overlap_joins_the_highest_scored():
    boxes = row_of_boxes(3)
    assert_close(nms_groups(boxes, tensor([0.7, 0.1, 0.8]), 0.5), tensor([0, 2, 2]))


def test_nms_groups_carry_no_gradient():
    boxes, scores = random_boxes(5, seed=0)
    assert not nms_groups(boxes.requires_grad_(), scores.requires_grad_(), 0.5).requires_grad


@pytest.mark.parametrize(
    ("boxes", "scores", "partitions"),
    [((3, 4), (2,), None), ((3, 5), (3,), None), ((2, 3, 4), (3,), None), ((3, 4), (3,), (2,))],
)
def test_nms_groups_of_tensors_that_do_not_fit_together_are_refused(boxes, scores, partitions):
    partitions = None if partitions is None else torch.zeros(partitions, dtype=torch.int64)
    with pytest.raises(ValueError, match="Expected boxes"):
        nms_groups(torch.zeros(boxes), torch.zeros(scores), 0.5, partitions)


@st.composite
def suppressions(draw: st.DrawFn) -> Tensor:
    """Draw (N, N) numbers 0 and 1, with 1 only above the diagonal."""
    n = draw(st.integers(1, 9))
    cells = draw(st.lists(st.integers(0, 1), min_size=n * n, max_size=n * n))
    return tensor(cells, dtype=torch.float32).view(n, n).triu(diagonal=1)


@given(suppressions(), st.integers(1, 5))
def test_suppression_is_greedy(suppresses, iterations):
    kept: list[bool] = []
    for j in range(len(suppresses)):
        kept.append(not any(kept[i] and suppresses[i, j] for i in range(j)))
    assert_close(module._greedily_kept(suppresses, iterations).bool(), tensor(kept))


@pytest.mark.parametrize("num_boxes", [90, 1304])
def test_chains_of_any_length_are_followed(num_boxes, on_each_path):
    groups = nms_groups(row_of_boxes(num_boxes), torch.arange(num_boxes, 0, -1) / num_boxes, 0.5)
    assert_close(groups, torch.arange(num_boxes) // 2 * 2)


def test_a_gpu_is_asked_once_in_four_iterations(monkeypatch):
    asked = []
    equal = torch.equal
    monkeypatch.setattr(module.torch, "equal", lambda *x: asked.append(x) or equal(*x))
    boxes, scores = random_boxes(3, 60, seed=0)
    on_cpu = nms_groups(boxes, scores, 0.3)
    num_asked = len(asked)
    with as_on_gpu_path():
        assert_close(nms_groups(boxes, scores, 0.3), on_cpu)
    assert num_asked > 4 and len(asked) - num_asked == math.ceil(num_asked / 4)


def test_groups_under_autocast_are_those_in_full_precision(on_each_path):
    boxes, scores = random_boxes(300, seed=0)
    expected = nms_groups(boxes, scores, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(nms_groups(boxes, scores, 0.3), expected)


def test_nms_groups_copy_nothing_to_the_host_but_whether_all_is_settled(as_on_gpu):
    boxes, scores = random_boxes(3, 60, seed=0)
    partitions = torch.arange(60).expand(3, 60) % 2
    groups = nms_groups(as_on_gpu(boxes), as_on_gpu(scores), 0.3, as_on_gpu(partitions))
    assert_close(groups.as_subclass(Tensor), nms_groups(boxes, scores, 0.3, partitions))
