import threading

import pytest
from steadyhelm.services.learner.prefetch import prefetched
from steadyhelm.telemetry import collect, span


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_items_come_in_order_and_all_of_them(count: int):
    with prefetched(lambda item: item * 10, range(count)) as prepared:
        assert list(prepared) == [item * 10 for item in range(count)]


def test_one_item_is_prepared_while_the_one_before_is_used_and_no_more():
    begun = [threading.Event() for _ in range(4)]

    def prepare(item: int) -> int:
        begun[item].set()
        return item

    with prefetched(prepare, range(4)) as prepared:
        assert next(prepared) == 0
        assert begun[1].wait(10)
        assert not begun[2].wait(0.05)
        assert next(prepared) == 1
        assert begun[2].wait(10)


def test_an_error_is_raised_where_its_item_is_taken():
    def prepare(item: int) -> int:
        if item == 1:
            raise ValueError("item 1 is bad")
        return item

    with prefetched(prepare, range(3)) as prepared:
        assert next(prepared) == 0
        with pytest.raises(ValueError, match="item 1 is bad"):
            next(prepared)


def test_spans_of_the_preparation_are_the_callers():
    def prepare(item: int) -> int:
        with span("learner", "collate"):
            return item

    with collect() as spans, prefetched(prepare, range(2)) as prepared:
        assert list(prepared) == [0, 1]
    assert sorted(found.name for found in spans) == ["collate", "collate", "input", "input"]
