"""Whose turn it is."""

import threading

from steadyhelm_operator.queue import WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drained(queue: WorkQueue[str]) -> list[str]:
    found = []
    while (key := queue.get(timeout_s=0.0)) is not None:
        found.append(key)
        queue.done(key)
    return found


def test_a_key_is_there_once_at_its_earliest_time():
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a", 5)
    queue.add("a", 2)
    queue.add("a", 9)
    assert (len(queue), drained(queue)) == (1, [])
    clock.now = 2.0
    assert drained(queue) == ["a"]
    clock.now = 99.0
    assert drained(queue) == []


def test_keys_come_in_the_order_in_which_they_are_due():
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    for key, delay in (("c", 3), ("a", 1), ("b", 2)):
        queue.add(key, delay)
    clock.now = 10.0
    assert drained(queue) == ["a", "b", "c"]


def test_a_key_in_somebodys_hands_is_given_out_again_only_when_it_is_back():
    queue: WorkQueue[str] = WorkQueue(Clock())
    queue.add("a")
    assert queue.get(0.0) == "a"
    queue.add("a")
    assert queue.get(0.0) is None
    queue.done("a")
    assert drained(queue) == ["a"]


def test_a_key_that_was_not_added_meanwhile_is_done():
    queue: WorkQueue[str] = WorkQueue(Clock())
    queue.add("a")
    queue.done(queue.get(0.0))
    assert (drained(queue), len(queue)) == ([], 0)


def test_no_key_is_ever_in_two_pairs_of_hands():
    queue: WorkQueue[int] = WorkQueue()
    held: set[int] = set()
    wrong: list[int] = []
    done = threading.Semaphore(0)

    def work() -> None:
        while (key := queue.get(timeout_s=5.0)) is not None:
            if key in held:
                wrong.append(key)
            held.add(key)
            queue.add(key) if len(wrong) > 99 else None
            held.discard(key)
            queue.done(key)
            done.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(300):
        queue.add(number % 3)
    assert done.acquire(timeout=10)
    queue.close()
    for thread in threads:
        thread.join(timeout=10)
    assert (wrong, any(thread.is_alive() for thread in threads)) == ([], False)


def test_whoever_waits_is_woken_by_a_key_and_by_the_end():
    queue: WorkQueue[str] = WorkQueue()
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.extend([queue.get(30.0), queue.get(30.0)]))
    thread.start()
    queue.add("a")
    while not found and thread.is_alive() and len(queue):
        pass
    queue.close()
    thread.join(timeout=10)
    assert found[0] == "a" or found == [None, None]
    assert not thread.is_alive()
