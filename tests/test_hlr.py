import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import slow_hierarchical_local_rank, slow_local_rank
from torch import Tensor, tensor
from torch.testing import assert_close

from pisa_d2.hlr import hierarchical_local_rank, local_rank

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Few different numbers, so that ties are the rule.
VALUES = st.sampled_from([math.nan, math.inf, -math.inf, -2.0, -0.0, 0.0, 0.25, 0.5, 1.0])
INT64 = st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)
# Dyadic, so that rounding cannot move an IoU across the threshold.
THRESHOLDS = st.sampled_from([0.0, 0.25, 0.5, 0.75])


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Draw values, groups and partitions."""
    few_ids = st.lists(INT64, min_size=1, max_size=3, unique=True).map(st.sampled_from)
    row = st.tuples(VALUES, draw(few_ids), draw(few_ids))
    rows = draw(st.lists(row, max_size=12))
    values, groups, partitions = zip(*rows, strict=True) if rows else ((), (), ())
    return (
        tensor(values, dtype=draw(st.sampled_from(DTYPES))),
        tensor(groups, dtype=torch.int64),
        tensor(partitions, dtype=torch.int64),
    )


@st.composite
def distinct_samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Draw samples whose values are different whole numbers."""
    values = draw(st.lists(st.integers(-99, 99), unique=True, min_size=1, max_size=12))
    ids = st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values))
    return tensor(values, dtype=torch.float32), tensor(draw(ids)), tensor(draw(ids))


@given(samples())
def test_local_rank_is_that_of_a_loop_over_groups(sample):
    values, groups, _ = sample
    expected = slow_local_rank(values.tolist(), groups.tolist())
    assert_close(local_rank(values, groups), tensor(expected, dtype=torch.int64))


@given(samples())
def test_hlr_is_that_of_a_loop_over_partitions_and_groups(sample):
    expected = slow_hierarchical_local_rank(*(t.tolist() for t in sample))
    assert_close(hierarchical_local_rank(*sample), tensor(expected, dtype=torch.int64))


@given(samples())
def test_hlr_without_partitions_ranks_all_together(sample):
    values, groups, _ = sample
    expected = hierarchical_local_rank(values, groups, torch.full_like(groups, 7))
    assert_close(hierarchical_local_rank(values, groups), expected)


def test_nan_of_either_sign_ranks_below_minus_infinity():
    nan = tensor(math.nan)
    values = torch.stack([nan, -nan, tensor(-math.inf), tensor(1.0), nan])
    expected = tensor([2, 3, 1, 0, 4])
    assert_close(local_rank(values, torch.zeros(5).long()), expected)
    assert_close(hierarchical_local_rank(values, torch.zeros(5).long()), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_groups_and_partitions_may_be_of_any_integer_type(dtype):
    values = tensor([0.1, 0.4, 0.3, 0.2])
    groups, partitions = tensor([1, 1, 0, 0], dtype=dtype), tensor([5, 5, 5, 9], dtype=dtype)
    assert_close(local_rank(values, groups), tensor([1, 0, 0, 1]))
    assert_close(hierarchical_local_rank(values, groups, partitions), tensor([2, 0, 1, 0]))


def test_huge_groups_and_partitions_are_told_apart():
    values = tensor([0.4, 0.3, 0.2, 0.1])
    for ids in (tensor([2**62, 0, 2**62, 0]), tensor([2**62, 2**62 + 1] * 2)):
        assert_close(local_rank(values, ids), tensor([0, 0, 1, 1]))
        assert_close(hierarchical_local_rank(values, ids // 4, ids), tensor([0, 0, 1, 1]))


def test_the_same_group_in_two_partitions_is_two_groups():
    values, groups = tensor([0.9, 0.8, 0.7, 0.6, 0.5]), tensor([1, 1, 1, 1, 2])
    ranks = hierarchical_local_rank(values, groups, tensor([0, 0, 1, 1, 1]))
    assert_close(ranks, tensor([0, 1, 0, 2, 1]))


def test_ranks_of_the_example_in_the_talk_are_d_c_a_e_b():
    names = ["A", "B", "C", "D", "E"]
    values = tensor([0.6, 0.5, 0.8, 0.9, 0.55])
    ranks = hierarchical_local_rank(values, tensor([1, 1, 1, 2, 2]))
    assert [names[i] for i in ranks.argsort()] == ["D", "C", "A", "E", "B"]


@given(samples())
def test_hlr_is_a_permutation_in_each_partition(sample):
    ranks = hierarchical_local_rank(*sample)
    for partition in sample[2].unique():
        of_partition = ranks[sample[2] == partition]
        assert_close(of_partition.sort().values, torch.arange(len(of_partition)))


@given(samples())
def test_the_best_of_each_group_come_before_the_second_best_of_any(sample):
    values, groups, partitions = sample
    ranks = hierarchical_local_rank(*sample)
    for partition in partitions.unique():
        members = partitions == partition
        in_group = local_rank(values[members], groups[members])
        by_rank = in_group[ranks[members].argsort()]
        assert_close(by_rank, by_rank.sort().values)


@given(
    samples(),
    st.sampled_from([lambda x: 3 * x - 7, lambda x: x**3 + x, lambda x: torch.atan(x / 99)]),
)
def test_only_the_order_of_values_matters(sample, increase):
    values, groups, partitions = sample
    # Whole numbers are small enough for strict changes; equal values stay equal.
    values = values.double().nan_to_num(posinf=99, neginf=-99).clamp(-99, 99).round()
    expected = hierarchical_local_rank(values, groups, partitions)
    assert_close(hierarchical_local_rank(increase(values), groups, partitions), expected)


@given(distinct_samples(), st.randoms(use_true_random=False))
def test_shuffled_samples_of_distinct_values_keep_their_ranks(sample, random):
    order = tensor(random.sample(range(len(sample[0])), len(sample[0])))
    shuffled = hierarchical_local_rank(*(t[order] for t in sample))
    assert_close(shuffled, hierarchical_local_rank(*sample)[order])


@pytest.mark.parametrize("num_groups", [1, 1000, 100_000])
def test_values_that_differ_in_the_last_digit_are_told_apart_among_100k_samples(num_groups):
    n = 100_000
    half = tensor(0.5).view(torch.int32)
    neighbours = (half + torch.arange(n, dtype=torch.int32)).view(torch.float32)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    # The n-th group holds the n-th highest of every num_groups values, so the order by local rank
    # and value is the same as by value alone.
    position = torch.arange(n).flip(0)
    ranks = hierarchical_local_rank(neighbours[order], (position % num_groups)[order])
    assert_close(ranks, position[order])


def positives_of_images(classes_of_images: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Draw samples of three objects per image, with separate groups in each."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for i, classes in enumerate(classes_of_images):
        objects = torch.randint(0, 3, (12,), generator=generator)
        images.append(
            {
                "values": torch.rand(12, generator=generator),
                "groups": 3 * i + objects,
                "partitions": tensor(classes)[objects],
            }
        )
    return images


def rank_images(images: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    batch = {name: torch.cat([image[name] for image in images]) for name in images[0]}
    return list(hierarchical_local_rank(**batch).split(12))


def test_ranks_of_two_images_stay_when_14_images_of_other_classes_join_them():
    images = positives_of_images([(0, 1, 0), (1, 0, 1)] + [(2, 3, 4)] * 14)
    assert_close(rank_images(images)[:2], rank_images(images[:2]))
    assert_close(rank_images(images[::-1])[:-3:-1], rank_images(images[:2]))


def test_ranks_do_not_depend_on_the_order_of_images():
    images = positives_of_images([(0, 1, 0), (1, 0, 1), (1, 1, 0), (0, 0, 0), (2, 1, 0)])
    ranks = rank_images(images)
    order = [3, 0, 4, 1, 2]
    assert_close(rank_images([images[i] for i in order]), [ranks[i] for i in order])


def test_ties_go_to_the_lower_index_among_many():
    n = 10_000
    values, index = torch.arange(n) % 3 / 3, torch.arange(n)
    by_value = sorted(range(n), key=lambda i: (-(i % 3), i))
    expected = torch.empty_like(index).scatter_(0, tensor(by_value), index)
    one_group = torch.zeros_like(index)
    assert_close(local_rank(values, one_group), expected)
    assert_close(hierarchical_local_rank(values, one_group), expected)
    assert_close(hierarchical_local_rank(values, index), expected)


def test_ranks_carry_no_gradient():
    values = tensor([0.1, 0.2], requires_grad=True)
    assert not local_rank(values, tensor([0, 0])).requires_grad
    assert not hierarchical_local_rank(values, tensor([0, 0])).requires_grad


@pytest.mark.parametrize(
    "shapes", [[(3,), (2,)], [(2, 2), (2, 2)], [(1,), (3,)], [(), ()], [(3,), (3, 1)]]
)
def test_ranks_of_tensors_that_do_not_fit_together_are_refused(shapes):
    values, groups = torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64)
    with pytest.raises(ValueError, match="'groups': "):
        local_rank(values, groups)
    with pytest.raises(ValueError, match="'groups': "):
        hierarchical_local_rank(values, groups)


def test_partitions_of_another_length_are_refused():
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="'partitions': \\(2,\\)"):
        hierarchical_local_rank(torch.zeros(3), ids, ids[:2])


def test_ranks_are_made_without_copies_to_the_host(as_on_gpu):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(50, generator=generator)
    groups, partitions = torch.randint(0, 5, (2, 50), generator=generator)
    ranks = local_rank(as_on_gpu(values), groups)
    assert_close(ranks.as_subclass(Tensor), local_rank(values, groups))
    ranks = hierarchical_local_rank(as_on_gpu(values), as_on_gpu(groups), as_on_gpu(partitions))
    assert_close(ranks.as_subclass(Tensor), hierarchical_local_rank(values, groups, partitions))
