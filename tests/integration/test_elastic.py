"""Real processes: engines are added, killed and drained while a run goes on, and its numbers stay the same."""

import json
import subprocess
import sys

import pytest
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.metrics_log import join_segments

from tests.integration.conftest import RUN

pytestmark = [pytest.mark.runs, pytest.mark.timeout(900)]

ENGINES = "batch: 4}, replicas: 2"
ONE_ENGINE = RUN.replace(ENGINES, "batch: 4}, replicas: 1") + "weights: {type: broadcast}\n"
SCALED = (
    RUN.replace(ENGINES, "batch: 4}, scaling: {max: 2, settle: 1, learner_wait: 0.01}") + "weights: {type: local}\n"
)
"""However weights travel: the undisturbed run's go through the store."""
DRIVER = '''
import asyncio, contextlib, os, signal, sys
from pathlib import Path

import psutil
from steadyhelm import driver
from steadyhelm.config.load import load_run_file
from steadyhelm.display import Display


async def until(holds):
    async with asyncio.timeout(240):
        while not holds():
            await asyncio.sleep(0.005)


def engines():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends meanwhile
            if (process.cmdline() or [""])[0].startswith("ray::Rollout"):
                found.append(process)
    return found


async def when_busy(pool, act):
    await until(lambda: pool.serving and all(member.works for member in pool.serving))
    act()


class Disturbed(driver.Driver):
    """Adds an engine behind iteration 1, kills one in iteration 3, drains one in iteration 4, removes one behind 5."""

    async def _note(self, report, services):
        await super()._note(report, services)
        if report.replayed or not report.metrics:
            return
        pool = services.rollout.pool
        match report.iteration:
            case 1:
                pool.resize(2)
                await until(lambda: len(pool.serving) == 2)
            case 2:
                kill = lambda: os.kill(engines()[0].pid, signal.SIGKILL)
                self.trouble = asyncio.create_task(when_busy(pool, kill))
            case 3:
                await self.trouble
                await until(lambda: len(pool.serving) == 2)
                drain = lambda: pool.drain(pool.serving[0], "the test says so")
                self.trouble = asyncio.create_task(when_busy(pool, drain))
            case 4:
                await self.trouble
                await until(lambda: len(pool.members) == len(pool.serving) == 2)
                await until(lambda: len(engines()) == 2)
            case 5:
                pool.resize(1)
                await until(lambda: len(pool.members) == 1)
                print("all of it happened", flush=True)


driver.Driver = Disturbed
with Display(live=False) as display:
    sys.exit(driver.run(load_run_file(Path("run.yaml"), ()), Path.cwd(), driver.RunOptions(), display.update))
'''


def lines(run):
    segments = {key: bytes(run.store.get(key)) for key in run.store.list(f"{run.run_id}/metrics/")}
    return {line.iteration: line for line in join_segments(segments)}


def test_engines_added_killed_and_drained_leave_the_numbers_as_they_are(make_run, undisturbed):
    run = make_run("elastic", ONE_ENGINE)
    (run.folder / "disturbed.py").write_text(DRIVER)
    run.command = lambda *more, name="": [sys.executable, "disturbed.py"]
    run.start()
    assert run.finish() == 0, run.text()
    said = run.text()
    assert "all of it happened" in said
    assert "rollout 1 serves" in said
    assert "is lost" in said
    assert "another one takes its place" in said
    assert "takes no new work: the test says so" in said
    assert "takes no new work: 1 are enough" in said
    assert said.count("has left") == 2
    assert run.trained() == undisturbed.trained()
    assert run.log.finished()["ledger"] == {"trained": 96}
    assert run.exact_metrics() == undisturbed.exact_metrics()
    serving = [lines(run)[iteration].metrics[names.ENGINES_SERVING] for iteration in (1, 2, 6)]
    assert serving == [1, 2, 1]
    assert all(0 < line.metrics[names.INPUT_WAIT] < 0.5 for line in lines(run).values())
    assert lines(run)[1].metrics[names.RESTARTS] == 0
    assert lines(run)[6].metrics[names.RESTARTS] == 1


def test_the_policy_adds_an_engine_and_whoever_watches_sees_why(make_run, undisturbed):
    run = make_run("scaled", SCALED)
    run.start()
    assert run.finish() == 0, run.text()
    assert run.exact_metrics() == undisturbed.exact_metrics()
    (note,) = (note for note in lines(run)[2].notes if note.startswith("engines"))
    assert note.startswith("engines 1 → 2 behind iteration 2: learner waited ")
    command = [sys.executable, "-m", "steadyhelm.cli", "watch", f"runs/{run.run_id}", "--once", "--json"]
    seen = json.loads(subprocess.run(command, cwd=run.folder, capture_output=True, text=True, check=True).stdout)
    assert (seen["committed"], seen["finished"]) == (6, True)
    assert {"iteration": 2, "text": note} in seen["notes"]
    assert seen["metrics"][names.ENGINES_DESIRED] == 2
