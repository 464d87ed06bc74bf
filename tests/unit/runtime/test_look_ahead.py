"""The learner rank's thread that hears of batches to come."""

import os
import threading

from ray.exceptions import ActorDiedError, GetTimeoutError
from steadyhelm.runtime.learner import NICE, look_ahead
from steadyhelm.runtime.mailbox import Expected
from steadyhelm.services import Coming


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def looked(answers: list[object]) -> tuple[list[int], list[Coming], list[int]]:
    """The numbers that were asked for, what was told, and how nice a thread is that the looking one starts."""
    asked: list[int] = []
    told: list[Coming] = []
    nice: list[int] = []

    def ask(number: int) -> tuple[Expected, ...] | None:
        asked.append(number)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]  # as the test says

    def expect(coming: Coming) -> None:
        told.append(coming)
        reader = threading.Thread(target=lambda: nice.append(niceness()))
        reader.start()
        reader.join()

    thread = threading.Thread(target=look_ahead, args=(ask, expect))
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return asked, told, nice


def entry(number: int) -> Expected:
    return Expected(number=number, coming=Coming(iteration=number))


def test_a_question_that_is_not_answered_in_time_is_asked_again() -> None:
    asked, told, _ = looked([(entry(0), entry(1)), GetTimeoutError(), (), (entry(2),), None])
    assert asked == [0, 2, 2, 2, 3]
    assert [coming.iteration for coming in told] == [0, 1, 2]


def test_a_mailbox_that_is_gone_ends_it() -> None:
    assert looked([ActorDiedError()])[0] == [0]


def test_only_the_threads_that_read_ahead_go_behind_others() -> None:
    before = niceness()
    _, _, nice = looked([(entry(0),), None])
    assert nice == [NICE]
    assert niceness() == before
