import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import highest_first
from torch import tensor

from pisa_d2.ordering import (
    at_least_float32,
    descending_order,
    gather_rows,
    refine_order,
    sort_in_order,
)

# With ties, both infinities and NaN of both signs.
VALUES = st.sampled_from([0.0, -0.0, 0.5, 1.0, math.inf, -math.inf, math.nan, -math.nan])


@given(st.lists(VALUES, max_size=12))
def test_the_highest_come_first_ties_by_index_and_nan_last(values):
    expected = sorted(range(len(values)), key=lambda i: highest_first(values[i], i))
    assert descending_order(tensor(values, dtype=torch.float32)).tolist() == expected


def test_each_row_is_ordered_by_itself_without_a_gradient():
    values = tensor([[0.1, 0.3, 0.2], [5.0, -1.0, 7.0]], requires_grad=True)
    assert descending_order(values).tolist() == [[1, 2, 0], [2, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_becomes_float32_and_nothing_becomes_less(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_refining_sorts_by_the_new_key_and_leaves_ties_as_they_were(pairs):
    first = tensor([a for a, _ in pairs], dtype=torch.int64)
    second = tensor([b for _, b in pairs], dtype=torch.int64)
    order = first.sort(stable=True).indices
    expected = sorted(range(len(pairs)), key=lambda i: (pairs[i][1], pairs[i][0], i))
    assert refine_order(order, second).tolist() == expected
    refined, keys = sort_in_order(order, second)
    assert refined.tolist() == expected
    assert torch.equal(keys, gather_rows(second, refined))
