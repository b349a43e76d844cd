import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from pisa_d2.data.catalog import evenly, register_dataset


@pytest.mark.parametrize(
    ("num", "expected"), [(1, "d"), (2, "be"), (3, "bdf"), (6, "abcdef"), (99, "abcdef")]
)
def test_items_are_taken_from_the_middle_of_equal_parts(num, expected):
    assert "".join(evenly("abcdef", num)) == expected
    assert evenly([], num) == []


def test_a_name_that_is_taken_is_replaced_or_left_alone():
    register_dataset("mine", lambda: [{"image_id": 1}], thing_classes=["a"])
    register_dataset("mine", lambda: [{"image_id": 2}], replace=False, thing_classes=["b"])
    assert DatasetCatalog.get("mine") == [{"image_id": 1}]
    assert MetadataCatalog.get("mine").thing_classes == ["a"]
    register_dataset("mine", lambda: [{"image_id": 3}], thing_classes=["c"])
    assert DatasetCatalog.get("mine") == [{"image_id": 3}]
    assert MetadataCatalog.get("mine").thing_classes == ["c"]
