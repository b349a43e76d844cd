from collections import Counter

import pytest
import torch
from helpers import build_sampler as build
from helpers import small_cfg
from hypothesis import given
from hypothesis import strategies as st

from pisa_d2 import PROPOSAL_SAMPLER_REGISTRY
from pisa_d2.samplers import Candidates, IoUBalancedSampler, build_proposal_sampler

SAMPLERS = ["RandomSampler", "InstanceBalancedSampler", "IoUBalancedSampler"]
IOU_BALANCED = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED"


def candidates(ious, objects=None, negative_range=(0.0, 0.5)):
    ious = torch.as_tensor(ious, dtype=torch.float32)
    if objects is None:
        objects = torch.zeros(len(ious))
    objects = torch.as_tensor(objects, dtype=torch.int64)
    boxes, classes = torch.zeros(len(ious), 4), torch.zeros_like(objects)
    return Candidates(boxes, ious, objects, classes, negative_range=negative_range)


@pytest.mark.parametrize("name", SAMPLERS)
@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 4)), max_size=40),
    st.integers(0, 50),
)
def test_indices_are_different_in_range_and_as_many_as_there_can_be(name, rows, num):
    ious, objects = zip(*rows, strict=True) if rows else ((), ())
    chosen = build(name)(candidates(ious, objects), num).tolist()
    assert len(chosen) == len(set(chosen)) == min(len(rows), num)
    assert set(chosen) <= set(range(len(rows)))


def test_random_draws_are_those_of_stock():
    torch.manual_seed(0)
    chosen = build("RandomSampler")(candidates(torch.rand(30)), 12)
    torch.manual_seed(0)
    torch.rand(30)
    assert torch.equal(chosen, torch.randperm(30)[:12])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30))
def test_objects_give_the_same_number_to_within_one_where_they_can(supply, num):
    objects = [i for i, count in enumerate(supply) for _ in range(count)]
    chosen = build("InstanceBalancedSampler")(candidates(torch.rand(len(objects)), objects), num)
    drawn = Counter(objects[i] for i in chosen.tolist())
    counts = [drawn[i] for i in range(len(supply))]
    share, rest = divmod(num, len(supply))
    for count, there in zip(counts, supply, strict=True):
        assert count >= min(there, share)
        if min(supply) > share:  # no object is short, so none gives more than the share rounded up
            assert count <= share + (rest > 0)


@given(
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
    st.integers(0, 30),
)
def test_bins_give_the_same_number_to_within_one_where_they_can(supply, num):
    centers = (1 / 12, 3 / 12, 5 / 12)  # of three bins from 0 to 0.5
    bins = [i for i, count in enumerate(supply) for _ in range(count)]
    chosen = build("IoUBalancedSampler")(candidates([centers[i] for i in bins]), num)
    drawn = Counter(bins[i] for i in chosen.tolist())
    for i, there in enumerate(supply):
        assert drawn[i] >= min(there, num // 3)
        if min(supply) > num // 3:
            assert drawn[i] <= -(-num // 3)


@pytest.mark.parametrize("num_bins", [1, 2, 3, 5])
def test_bins_cut_the_interval_up_to_the_background_threshold(num_bins):
    # The last bin includes its maximum; no negative is above the threshold.
    per_bin = 40
    edges = torch.linspace(0, 0.5, num_bins + 1)
    ious = torch.cat(
        [
            torch.linspace(float(a) + 1e-4, float(b) - 1e-4, per_bin)
            for a, b in edges.unfold(0, 2, 1)
        ]
    )
    ious[-1] = 0.5
    sampler = build("IoUBalancedSampler", f"{IOU_BALANCED}.NUM_BINS", num_bins)
    chosen = sampler(candidates(ious), 6 * num_bins)
    assert torch.bincount(chosen // per_bin, minlength=num_bins).tolist() == [6] * num_bins


@pytest.mark.parametrize("negative_range", [(0.0, 0.3), (0.1, 0.5), (0.2, 0.25), (0.0, 1.0)])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_the_bins_cut_the_range_that_comes_with_the_candidates(negative_range, as_tensors):
    low, high = negative_range
    ious = torch.linspace(low, high, 401)[1:-1]  # none on the border between two bins
    if as_tensors:
        negative_range = tuple(torch.tensor(negative_range))
    chosen = IoUBalancedSampler(num_bins=3)(candidates(ious, None, negative_range), 90)
    bins = ((ious[chosen] - low) / (high - low) * 3).long()
    assert torch.bincount(bins, minlength=3).tolist() == [30, 30, 30]


def test_a_floor_at_or_above_the_range_of_the_negatives_is_refused_at_the_call():
    sampler = IoUBalancedSampler(floor_thresh=0.4)
    with pytest.raises(ValueError, match="floor_thresh = 0.4.*below the highest IoU .* 0.3"):
        sampler(candidates(torch.rand(30), None, (0.0, 0.3)), 10)


def test_every_call_samples_by_the_same_rule():
    sampler = build("IoUBalancedSampler")
    before = dict(vars(sampler))
    ious = torch.cat([torch.zeros(900), torch.full((50,), 0.2), torch.full((50,), 0.4)])
    for _ in range(3):
        chosen = sampler(candidates(ious), 30)
        assert torch.bincount((ious[chosen] * 6).long(), minlength=3).tolist() == [10, 10, 10]
    assert vars(sampler) == before


def test_what_a_bin_is_short_of_comes_at_random_from_all_the_rest():
    torch.manual_seed(0)
    sampler = build("IoUBalancedSampler")
    ious = torch.cat([torch.zeros(300), torch.full((100,), 0.2), torch.full((2,), 0.4)])
    totals = torch.zeros(3)
    for _ in range(300):
        chosen = sampler(candidates(ious), 60)
        totals += torch.bincount((ious[chosen] * 6).long(), minlength=3)
    # 20 + 20 + 2 are shares; 18 more come from 280 and 80 others.
    expected = torch.tensor([20 + 18 * 280 / 360, 20 + 18 * 80 / 360, 2]) * 300
    assert ((totals - expected).abs() < 0.02 * expected + 1).all()


@pytest.mark.parametrize(
    ("floor", "fraction", "expected"),
    [(0.1, 0.25, 10), (0.1, 0.0, 0), (0.0, 0.5, 20), (-1.0, 0.5, None)],
)
def test_a_fraction_comes_from_below_the_floor(floor, fraction, expected):
    opts = [f"{IOU_BALANCED}.FLOOR_THRESH", floor, f"{IOU_BALANCED}.FLOOR_FRACTION", fraction]
    ious = torch.cat([torch.zeros(100), torch.linspace(0.11, 0.5, 300)])
    chosen = build("IoUBalancedSampler", *opts)(candidates(ious), 40)
    num_low = int((ious[chosen] <= max(floor, 0)).sum())
    if expected is None:  # no floor: the zeros are part of the first of three bins
        assert num_low <= 14
    else:
        assert num_low == expected


def test_what_lies_below_the_floor_fills_up_what_is_short():
    opts = [f"{IOU_BALANCED}.FLOOR_THRESH", 0.1, f"{IOU_BALANCED}.FLOOR_FRACTION", 0.25]
    ious = torch.cat([torch.zeros(100), torch.full((5,), 0.3)])
    chosen = build("IoUBalancedSampler", *opts)(candidates(ious), 40)
    assert int((ious[chosen] > 0).sum()) == 5 and len(chosen) == 40


def test_random_and_balanced_sampling_reach_every_candidate():
    torch.manual_seed(0)
    ious = torch.linspace(0, 0.499, 60)
    for name in SAMPLERS:
        sampler = build(name)
        counts = torch.zeros(60)
        for _ in range(2000):
            counts[sampler(candidates(ious), 15)] += 1
        # All groups have the same size, so each candidate has the same chance, 1 in 4.
        chi_squared = ((counts - 500) ** 2 / (500 * 0.75)).sum()
        assert chi_squared < 100, name  # 59 degrees of freedom; exceeds 98.3 once in 1,000


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("NUM_BINS", 0, "at least 1"),
        ("FLOOR_THRESH", 0.6, "below the highest IoU of negatives, 0.5"),
        ("FLOOR_THRESH", 1.5, r"in \[-1, 1\]"),
        ("FLOOR_THRESH", 0.5, "below the highest IoU"),
        ("FLOOR_FRACTION", 1.5, r"in \[0, 1\]"),
    ],
)
def test_a_wrong_setting_names_the_key(key, value, allowed):
    with pytest.raises(ValueError, match=rf"IOU_BALANCED\.{key} = {value}.*{allowed}"):
        build("IoUBalancedSampler", f"{IOU_BALANCED}.{key}", value)


@pytest.mark.parametrize("kind", ["POSITIVE_SAMPLER", "NEGATIVE_SAMPLER"])
def test_an_unknown_sampler_is_refused_with_a_list_of_those_there_are(kind):
    cfg = small_cfg(f"MODEL.ROI_HEADS.{kind}.NAME", "Best")
    with pytest.raises(ValueError, match=rf"{kind}\.NAME = 'Best'.*'IoUBalanced.*'RandomSampler'"):
        build_proposal_sampler(cfg, kind)
    assert set(SAMPLERS) <= {name for name, _ in PROPOSAL_SAMPLER_REGISTRY}
