import asyncio
import threading
import time

import pytest
from steadyhelm.telemetry import Span, collect, covered_s, overhead, phase_seconds, span


def stretch(start: float, end: float, computes: bool = True, service: str = "learner", name: str = "step") -> Span:
    return Span(service=service, name=name, start_s=start, end_s=end, computes=computes)


def test_overhead_is_what_no_computing_span_covers():
    spans = [stretch(1.0, 4.0), stretch(3.0, 5.0, service="rollout"), stretch(8.0, 9.0), stretch(0.0, 10.0, False)]
    assert overhead(spans, 0.0, 10.0) == 0.5


def test_overhead_ignores_what_lies_outside_of_the_interval():
    assert overhead([stretch(-5.0, 1.0), stretch(9.0, 20.0), stretch(30.0, 40.0)], 0.0, 10.0) == 0.8


def test_overhead_of_nothing_is_everything_and_of_full_cover_nothing():
    assert overhead([], 2.0, 4.0) == 1.0
    assert overhead([stretch(0.0, 9.0), stretch(3.0, 4.0)], 2.0, 4.0) == 0.0


def test_an_interval_without_length_is_refused():
    with pytest.raises(ValueError, match=r"from 2\.0 to 2\.0 has no length"):
        overhead([], 2.0, 2.0)


def test_nested_and_repeated_intervals_count_once():
    assert covered_s([(0.0, 6.0), (1.0, 2.0), (0.0, 6.0), (6.0, 7.0)], 0.0, 10.0) == 7.0


def test_phase_seconds_are_per_service_and_name_and_workers_that_overlap_count_once():
    spans = [
        stretch(0.0, 4.0, service="rollout", name="generate"),
        stretch(2.0, 6.0, service="rollout", name="generate"),
        stretch(7.0, 8.0),
    ]
    assert phase_seconds(spans) == {"seconds/learner.step": 1.0, "seconds/rollout.generate": 6.0}


def test_a_span_is_collected_with_its_time_even_if_the_block_fails():
    before = time.monotonic()
    with collect() as spans, pytest.raises(KeyError), span("learner", "backward", computes=True):
        raise KeyError
    (only,) = spans
    assert (only.service, only.name, only.computes) == ("learner", "backward", True)
    assert before <= only.start_s <= only.end_s <= time.monotonic()


def test_the_innermost_collector_takes_a_span_and_outside_of_any_nothing_happens():
    with collect() as outer:
        with collect() as inner, span("a", "x"):
            pass
        with span("a", "y"):
            pass
    with span("a", "z"):
        pass
    assert [item.name for item in inner] == ["x"]
    assert [item.name for item in outer] == ["y"]


async def test_tasks_and_threads_add_to_the_collector_of_their_context():
    async def task(name: str) -> None:
        with span("a", name):
            await asyncio.sleep(0)

    def work() -> None:
        with span("a", "thread"):
            pass

    with collect() as spans:
        await asyncio.gather(task("one"), task("two"), asyncio.to_thread(work))
    assert sorted(item.name for item in spans) == ["one", "thread", "two"]


def test_many_threads_lose_no_span():
    import contextvars

    def work() -> None:
        for _ in range(200):
            with span("a", "x"):
                pass

    with collect() as spans:
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(spans) == 1600


async def test_two_concurrent_calls_collect_apart():
    async def call(name: str) -> list[str]:
        with collect() as spans:
            for _ in range(3):
                with span("a", name):
                    await asyncio.sleep(0)
        return [item.name for item in spans]

    assert await asyncio.gather(call("one"), call("two")) == [["one"] * 3, ["two"] * 3]
