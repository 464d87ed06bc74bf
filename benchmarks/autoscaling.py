"""Autoscaling: how soon engines and their pods follow a load that rises and falls again, and a picture of it.

A real run of the task in ``tide/``, whose prompts are short, then long, then short; its engines take the time of an
accelerator and sleep, so that few cores are enough for three of them. With ``--release NAME`` (and ``--namespace
NAME``) it is sent to that release of the cluster chart, where kubectl finds it; else it runs on this machine, without
pods. ``--picture FILE`` draws it as SVG. ``--quick`` is a shorter load.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import table
import timeline
import whole_runs
import yaml
from steadyhelm.errors import SteadyhelmError
from steadyhelm.jobs.forward import PortForward, find, kubectl, secret_token
from steadyhelm.jobs.head import STATUS_PORT
from steadyhelm.jobs.status import read_status
from steadyhelm.telemetry import MetricsLine
from steadyhelm.telemetry import metrics as names
from tide import tide as task

RUN_FILE = Path(__file__).with_name("tide") / "tide.yaml"
GOAL_S = 30.0
LOOK_S = 0.5
LEAVE_S = 120.0
"""How long pods are looked at once the run is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What was seen at one time, in Unix seconds: engines by the driver's status, and the rollout pool's pods.

    ``started`` is when Ray's container of each pod began to run.
    """

    at_s: float
    wanted: int = 0
    serving: int = 0
    pods: int = 0
    started: tuple[float, ...] = ()


@dataclass(kw_only=True)
class Place:
    """Where the run is: the command that starts it and ends with it, its status, pods and metrics."""

    command: list[str]
    environment: dict[str, str]
    status: str
    token: str
    pods: Callable[[], dict[str, float]]
    lines: Callable[[], list[MetricsLine]]
    least: int
    moments: list[Moment] = field(default_factory=list)

    def follow(self) -> None:
        """Runs it, looking every ``LOOK_S``, until it is over and its pods are as few as they get."""
        with subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            while process.poll() is None:
                self._look()
                time.sleep(LOOK_S)
            said = process.stdout.read() if process.stdout else ""
        if process.returncode:
            raise RuntimeError(f"{' '.join(self.command)} failed:\n{said}")
        ends = time.monotonic() + LEAVE_S
        while self.moments[-1].pods > self.least and time.monotonic() < ends:
            self._look()
            time.sleep(LOOK_S)

    def _look(self) -> None:
        last = self.moments[-1] if self.moments else Moment(at_s=0)
        pods = self.pods()
        try:
            rollouts = read_status(self.status, self.token).rollouts
            wanted, serving = rollouts.desired, rollouts.ready
        except SteadyhelmError:  # it has not begun, or is over
            wanted, serving = last.wanted, last.serving
        started = tuple(sorted(begin for begin in pods.values() if begin))
        now = Moment(at_s=time.time(), wanted=wanted, serving=serving, pods=len(pods), started=started)
        self.moments.append(now)


def here(folder: Path, settings: Sequence[str]) -> Place:
    """A run on this machine, kept in ``folder``."""
    token, port = secrets.token_hex(8), free_port()
    own = {"STEADYHELM_STATUS_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_TOKEN": token}
    words = ["run", str(RUN_FILE), "--quiet", *settings, "--set", f"store.uri={folder}"]
    return Place(
        command=[sys.executable, "-m", "steadyhelm.cli", *words],
        environment={**os.environ, **own},
        status=f"http://127.0.0.1:{port}",
        token=token,
        pods=dict,
        lines=lambda: whole_runs.lines_of(folder, "tide-transformers"),
        least=0,
    )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def there(release: str, namespace: str, settings: Sequence[str], stack: ExitStack) -> Place:
    """A run of its own on a release of the cluster chart, whose port-forward ends with ``stack``."""
    run, named = f"tide-{secrets.token_hex(3)}", find(release, namespace)
    forward = stack.enter_context(PortForward(named.cluster, namespace))

    def ask(*words: str) -> str:
        return subprocess.run([*kubectl(namespace), *words], capture_output=True, text=True, check=True).stdout

    def in_head(*words: str) -> str:
        ours = f"ray.io/cluster={named.cluster},ray.io/node-type=head"
        head = ask("get", "pods", "-l", ours, "-o", "name").split()[0]
        return ask("exec", head, "-c", "ray-head", "--", *words)

    def pods() -> dict[str, float]:
        found = json.loads(
            ask("get", "pods", "-l", f"ray.io/cluster={named.cluster},ray.io/group=rollout", "-o", "json")
        )
        return {pod["metadata"]["name"]: began(pod) for pod in found["items"]}

    store = in_head("printenv", "STEADYHELM_STORE_URI").strip()
    place, mark, query = store.partition("?")

    def lines() -> list[MetricsLine]:
        said = in_head("steadyhelm", "report", "--metrics", f"{place}/{run}{mark}{query}")
        return [MetricsLine.parse(text) for text in said.splitlines()]

    words = ["submit", str(RUN_FILE), "--id", run, "--release", release, "--quiet", *settings]
    return Place(
        command=[sys.executable, "-m", "steadyhelm.cli", *words, "--set", f"store.uri={store}"]
        + (["--namespace", namespace] if namespace else []),
        environment=dict(os.environ),
        status=f"http://127.0.0.1:{forward.local[STATUS_PORT]}",
        token=secret_token(named.secret, namespace),
        pods=pods,
        lines=lines,
        least=1,
    )


def began(pod: dict[str, Any]) -> float:
    """When the pod's container began to run, in Unix seconds; 0 where it does not."""
    states = [state["state"].get("running", {}) for state in pod["status"].get("containerStatuses", [])]
    return unix(states[0]["startedAt"]) if states and states[0] else 0.0


def unix(time_of_day: str) -> float:
    """RFC 3339 in seconds."""
    return datetime.fromisoformat(time_of_day).timestamp()


def started(line: MetricsLine) -> float:
    """When the iteration began."""
    return unix(line.time) - line.metrics[names.ITERATION_SECONDS]


def rows(place: Place, lines: Sequence[MetricsLine], load: Mapping[str, int], wait: float) -> list[table.Row]:
    """What the run shows.

    Overload begins with the first iteration of the long prompts in which the learner waits longer than its goal,
    ``wait``; it is gone when the last iteration of them has ended.
    """
    moments, wanted = place.moments, [line.metrics[names.ENGINES_DESIRED] for line in lines]
    first, behind = load["short"], load["short"] + load["long"]
    over = next(line for line in lines if line.iteration >= first and line.metrics[names.LEARNER_WAIT] > wait)
    overload = started(over)
    decided = next(moment.at_s for moment in moments if moment.at_s > overload and moment.wanted > 1)
    served = next(moment.at_s for moment in moments if moment.at_s > overload and moment.serving > 1)
    parts = [("it is decided", overload, decided)]
    if place.least:
        made = next(moment.at_s for moment in moments if moment.at_s > overload and moment.pods > 1)
        runs = next(moment.started[-1] for moment in moments if len(moment.started) > 1)
        parts += [
            ("its pod is made", decided, made),
            ("Ray's container begins", made, runs),
            ("it serves", runs, served),
        ]
    else:
        parts.append(("it serves", decided, served))
    found = [row("overload to a new engine that serves", served - overload, goal=GOAL_S)]
    found += [row(f"of it, until {what}", end - begin) for what, begin, end in parts]
    loaded = [line for line in lines if first < line.iteration <= behind]
    for engines in (1, max(moment.serving for moment in moments)):
        waits = [it.metrics[names.LEARNER_WAIT] for it in loaded if it.metrics[names.ENGINES_SERVING] == engines]
        if waits:
            found.append(row(f"learner's wait under load, {engines} serving", statistics.median(waits), "share"))
    gone = next(unix(line.time) for line in lines if line.iteration == behind)
    few = [moment.at_s for moment in moments if moment.at_s > gone and moment.wanted == 1]
    left = [moment.at_s for moment in moments if few and moment.at_s > few[0] and moment.pods == place.least]
    if few:
        found.append(row("load gone to one engine wanted", few[0] - gone))
    if place.least and left:
        found.append(row("one engine wanted to one pod left", left[0] - few[0]))
    moves = [after - before for before, after in pairwise([1.0, *wanted]) if after != before]
    turns = sum((before > 0) != (after > 0) for before, after in pairwise(moves))
    return [*found, row("turns of the number besides the load's own", max(0, turns - 1), "", goal=0)]


def row(name: str, value: float, unit: str = "s", goal: float | None = None) -> table.Row:
    """A figure of which less is better."""
    return table.Row(name=name, value=value, unit=unit, goal=goal, better="lower")


def picture(place: Place, lines: Sequence[MetricsLine], load: Mapping[str, int], wait: float) -> str:
    """The run over time, from its first iteration on."""
    zero = started(lines[0])
    seen = [moment for moment in place.moments if moment.at_s >= zero]

    def of(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((started(line) - zero, line.metrics[name]) for line in lines)

    def over_time(value: Callable[[Moment], int]) -> tuple[tuple[float, float], ...]:
        return tuple((moment.at_s - zero, float(value(moment))) for moment in seen)

    held = timeline.Panel(
        title="engines and pods",
        lines=(
            timeline.Line(name="wanted", points=over_time(lambda moment: moment.wanted)),
            timeline.Line(name="serving", points=over_time(lambda moment: moment.serving)),
            *((timeline.Line(name="pods", points=over_time(lambda moment: moment.pods)),) if place.least else ()),
        ),
        top=3,
    )
    wait_share = timeline.Panel(
        title="learner's wait, share of an iteration",
        lines=(timeline.Line(name="", points=of(names.LEARNER_WAIT)),),
        goal=wait,
    )
    queue = timeline.Panel(
        title="queue, most orders at once for each engine", lines=(timeline.Line(name="", points=of(names.QUEUE)),)
    )
    saturation = timeline.Panel(
        title="engines' saturation", lines=(timeline.Line(name="", points=of(names.SATURATION)),)
    )
    first, behind = load["short"], load["short"] + load["long"]
    loaded = [started(line) - zero for line in lines if first < line.iteration <= behind + 1]
    spans = [timeline.Span(name="long prompts", begin_s=loaded[0], end_s=loaded[-1])]
    end_s = max(seen[-1].at_s, unix(lines[-1].time)) - zero
    return timeline.draw("Engines and pods follow the load", [wait_share, queue, saturation, held], spans, end_s)


def measure(release: str, namespace: str, drawn: Path | None, quick: bool) -> Sequence[table.Row]:
    """Runs it, and draws it where that is asked for."""
    load = task.QUICK if quick else task.ITERATIONS
    wait = yaml.safe_load(RUN_FILE.read_text())["rollout"]["scaling"].get("learner_wait", 0.2)
    settings = ["--set", f"schedule.iterations={sum(load.values())}"]
    settings += ["--set", "data.train=tide.py:quick_pairs"] if quick else []
    with ExitStack() as stack:
        if release:
            place = there(release, namespace, settings, stack)
        else:
            place = here(Path(stack.enter_context(tempfile.TemporaryDirectory())), settings)
        place.follow()
        lines = [line for line in place.lines() if names.ENGINES_DESIRED in line.metrics]
    if drawn is not None:
        drawn.write_text(picture(place, lines, load, wait))
    return rows(place, lines, load, wait)


def main() -> None:
    """The command line; ``table.main`` takes the flags that all benchmarks have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--release", default="")
    parser.add_argument("--namespace", default="")
    parser.add_argument("--picture", type=Path)
    given, _ = parser.parse_known_args()
    table.main(__doc__ or "", partial(measure, given.release, given.namespace, given.picture), own=parser)


if __name__ == "__main__":
    main()
