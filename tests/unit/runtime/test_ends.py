"""The end of a run's processes, and the environment that they get."""

import asyncio

import pytest
from steadyhelm.config import RunFile
from steadyhelm.runtime.cluster import environment
from steadyhelm.runtime.learner import ended

RUN = RunFile.model_validate(
    {
        "name": "fake",
        "model": {"path": "unused"},
        "data": {"train": "unused.py:pairs"},
        "schedule": {"iterations": 1},
        "runtime": {"threads": 3},
    }
)


async def test_a_mailbox_that_never_answers_does_not_hold_up_the_end():
    stuck: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    await asyncio.wait_for(ended(stuck, over, 0.05), 30)
    assert not over.done()


async def test_a_mailbox_that_is_gone_is_no_error_at_the_end():
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    gone.set_exception(RuntimeError("the actor is dead"))
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    await asyncio.wait_for(ended(gone, over, 600), 30)


async def test_the_end_waits_for_the_ranks_once_they_have_heard():
    loop = asyncio.get_running_loop()
    heard, over = loop.create_future(), loop.create_future()
    heard.set_result(None)
    loop.call_later(0.05, over.set_result, None)
    await asyncio.wait_for(ended(heard, over, 600), 30)
    assert over.done()


@pytest.mark.parametrize("name", ["RAY_USAGE_STATS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"])
def test_telemetry_of_libraries_is_off_unless_the_user_says_otherwise(name):
    off = environment(RUN, {})[name]
    on = {"0": "1", "1": "0"}[off]
    assert environment(RUN, {name: on})[name] == on


def test_threads_are_the_run_files_whatever_the_environment_says():
    assert environment(RUN, {"OMP_NUM_THREADS": "8"})["OMP_NUM_THREADS"] == "3"
