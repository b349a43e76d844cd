import pytest

from pisa_d2.data.messages import MAX_NAMED, named


@pytest.mark.parametrize("num", range(9))
def test_a_few_items_are_named_and_the_rest_counted(num):
    items = [f"item {i}" for i in range(num)]
    listed, _, rest = named(items).partition(" and ")
    assert [name for name in listed.split(", ") if name] == items[:MAX_NAMED]
    assert rest == (f"{num - MAX_NAMED} more" if num > MAX_NAMED else "")
