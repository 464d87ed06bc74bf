"""A run seen out of its store alone."""

import io
import json

import pytest
from steadyhelm.cli import app
from steadyhelm.display import Display
from steadyhelm.errors import ConfigError
from steadyhelm.store import LocalStore
from steadyhelm.store.liveness import held
from steadyhelm.telemetry import EvalDone, Event, IterationDone, Notice
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore
from steadyhelm.watch import Watcher, follow, follow_json
from typer.testing import CliRunner


def kinds(events: list[Event]) -> list[str]:
    return [f"{type(event).__name__} {getattr(event, 'iteration', '')}".strip() for event in events]


async def test_each_look_tells_what_is_new_as_the_terminal_was_told_it(start, run_file):
    store, seen = MemoryStore(), []
    run = start(store)
    watcher = Watcher(store, "fake")
    told = run.driver._told

    def look(event: Event) -> None:
        told(event)
        if isinstance(event, IterationDone):
            seen.append(watcher.look())

    run.driver._told = look
    await run.follow()
    seen.append(watcher.look())
    assert [(status.committed, status.metrics_of) for status, _ in seen] == [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4)]
    assert [status.evaluated for status, _ in seen] == [0, 0, 2, 2, 4]
    assert [kinds(events) for _, events in seen[:3]] == [
        ["EvalDone 0"],
        ["IterationDone 1"],
        ["IterationDone 2", "EvalDone 2"],
    ]
    assert [status.finished for status, _ in seen] == [False] * 4 + [True]
    shown = [event for _, events in seen for event in events if isinstance(event, IterationDone | EvalDone)]
    said = [event for event in run.told if isinstance(event, IterationDone | EvalDone)]
    assert sorted(map(str, shown)) == sorted(map(str, said))
    assert watcher.look()[1] == []


async def test_a_run_that_died_says_so_and_what_it_had(start, tmp_path):
    store = LocalStore(tmp_path)
    faulty = MemoryStore()
    faulty.fail("fake/log/00000009")
    with pytest.raises(InjectedCrash):
        await start(faulty).follow()
    for key in faulty.list(""):
        store.put(key, faulty.get(key))
    status = Watcher(store, "fake").sure()
    assert (status.committed, status.iterations, status.finished) == (2, 4, False)
    assert status.drive == "driven by nobody"
    with held(store, "fake"):
        assert Watcher(store, "fake").sure().drive.startswith("driven by pid ")


@pytest.fixture
async def finished(start, tmp_path) -> LocalStore:
    store = LocalStore(tmp_path)
    run = start(store)
    run.driver._tell(Notice(text="engines 1 → 3 behind iteration 0: the learner waited"))
    await run.follow()
    return store


async def test_the_command_shows_a_run_once_for_people_and_as_json(finished, tmp_path):
    place = str(tmp_path / "fake")
    shown = CliRunner().invoke(app, ["watch", place, "--once"])
    assert shown.exit_code == 0
    head, iteration, evaluation, note = shown.stdout.splitlines()[:4]
    assert head.endswith("/fake: 4 of 4 iterations committed, attempt 1, finished")
    assert iteration.startswith("iteration 4/4  reward ")
    assert "staleness 0.00" in iteration
    assert evaluation.startswith("evaluation after iteration 4: accuracy ")
    assert note == "iteration 1: engines 1 → 3 behind iteration 0: the learner waited"
    status = json.loads(CliRunner().invoke(app, ["watch", place, "--once", "--json"]).stdout)
    assert (status["committed"], status["metrics_of"], status["finished"]) == (4, 4, True)
    assert status["metrics"]["reward/mean"] > 0
    assert status["notes"][0] == {"iteration": 1, "text": "engines 1 → 3 behind iteration 0: the learner waited"}


async def test_following_ends_with_the_run_and_prints_its_notes(finished):
    stream, lines = io.StringIO(), []
    follow(Watcher(finished, "fake"), Display(stream, live=False), 0.01)
    assert "engines 1 → 3 behind iteration 0" in stream.getvalue()
    follow_json(Watcher(finished, "fake"), lines.append, 0.01)
    assert [json.loads(line)["committed"] for line in lines] == [4]


def test_a_run_that_does_not_exist_cannot_be_watched(tmp_path):
    with pytest.raises(ConfigError, match="there is no run 'none'"):
        Watcher(LocalStore(tmp_path), "none")
