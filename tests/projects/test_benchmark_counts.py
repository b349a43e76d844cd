"""Operators and waits, which are the same on every machine, stay within their bounds."""

from importlib import import_module

import pytest
import torch
from helpers import load_script

counts = load_script("projects/Benchmark/benchmark_counts.py")
counting = import_module("counting")

ROWS = [
    *(
        (section, what, 2)
        for section, (_, variants) in counts.SECTIONS.items()
        for what in variants
    ),
    *((section, what, 16) for section, what in (("losses", "PISA"), ("losses", counts.STOCK))),
]


def test_operators_and_waits_do_not_grow():
    of_rows = {row: counts.counts_of(*row) for row in ROWS}
    rows = []
    for (section, what, images), own in of_rows.items():
        stock = of_rows[section, counts.STOCK, images]
        rows.append(counts.row_of(section, what, images, own, stock))
    assert counts.check(rows) == []


@pytest.mark.parametrize("name", ["PISA, Score-HLR", "PISA, OHEM", "RetinaNet, PISA"])
def test_each_wait_of_a_step_has_a_reason(name):
    waits = counts.waits_of_step(name)
    assert len(waits) > 3
    assert counts.unlisted(waits) == []


def test_an_operator_more_than_its_bound_and_a_wait_without_a_reason_are_named():
    row = counts.Row("losses", "PISA", 2, 900, 800, 9, 1, 0)
    assert counts.check([row]) == [
        "operators of losses, PISA, 2 images: 800 beyond Detectron2's, bound "
        f"{counts.bounds()['added_operators']['losses']['PISA'][0]}"
    ]
    assert counts.check([row._replace(added=0)]) == []
    other = counts.Wait("pisa_d2/hlr.py", "local_rank", "item")
    assert counts.unlisted([other]) == [other]


def test_views_and_allocations_are_not_counted_and_waits_know_their_line():
    def function():
        values = torch.empty(3, 4).view(4, 3)[1:]
        values.fill_(1)
        with counting.uncounted():
            values.sum()
        return (values + 1).tolist()

    counted = counts.count(function)
    assert sorted(place.operator for place in counted.operators) == ["add", "fill_"]
    assert [place.operator for place in counted.waits] == ["tolist"]


def test_only_masks_that_torch_must_count_are_waits():
    """As on a GPU, where a scalar is filled in through a mask without one."""

    def function():
        values, mask = torch.zeros(4), torch.tensor([True, False, True, False])
        values[mask] = 1.0
        values[mask] = torch.ones(2)
        values[torch.tensor([0, 1])] = 2.0
        return values[mask]

    counted = counting.count(function)
    assert sorted(place.operator for place in counted.waits) == ["index", "index_put_"]
