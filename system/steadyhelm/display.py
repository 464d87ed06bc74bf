"""What the person at the terminal sees: a live picture of the run, or one plain line an iteration where no one draws.

Fed by the events of ``telemetry.events`` alone; knows neither loop nor driver.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from steadyhelm.telemetry import EvalDone, Event, IterationDone, Notice, RunStarted, ServiceState
from steadyhelm.telemetry import metrics as names
from steadyhelm.telemetry.logs import redact, secret_values

EVENTS_SHOWN = 5
HISTORY = 40  # iterations in a spark line
PACE_OVER = 10  # iterations whose mean time the forecast uses: early ones are slower
BARS = "▁▂▃▄▅▆▇█"
LEVEL_STYLE = {"info": "", "warning": "yellow", "error": "bold red"}
STALENESS = {names.STALENESS_MEAN, names.STALENESS_DROPPED}  # shown where it is not always 0
NOT_PARTS = {names.REWARD_MEAN, names.REWARD_STD, names.REWARD_VALID_RATE}


def duration(seconds: float) -> str:
    """``0:07``, ``12:34`` or ``1:02:03``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def sparkline(values: list[float]) -> str:
    """``values`` as a row of bars between their least and greatest; NaN is a gap."""
    known = [value for value in values if value == value]
    if not known:
        return ""
    low, width = min(known), max(known) - min(known)
    level = (len(BARS) - 1) / width if width else 0.0
    return "".join(BARS[round((v - low) * level) if width else 3] if v == v else " " for v in values)


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """Accuracy with its interval, then what else an evaluation found."""
    line = f"accuracy {100 * metrics.get(names.EVAL_ACCURACY, float('nan')):.1f} %"
    if names.EVAL_ACCURACY_LOW in metrics and names.EVAL_ACCURACY_HIGH in metrics:
        line += f" [{100 * metrics[names.EVAL_ACCURACY_LOW]:.1f}, {100 * metrics[names.EVAL_ACCURACY_HIGH]:.1f}]"
    for name, label in (
        (names.EVAL_BOTH_ORDERS, "both orders right"),
        (names.EVAL_FIRST_SLOT, "chose the first"),
        (names.EVAL_UNPARSABLE, "unparsable"),
        (names.EVAL_FORMAT, "format"),
        (names.EVAL_CONSISTENCY, "consistent"),
    ):
        if name in metrics:
            line += f", {label} {100 * metrics[name]:.1f} %"
    return line


class Progress:
    """What is known of the run so far, from its events."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started_s = clock()
        self.run = RunStarted(run="", iterations=0)
        self.iteration = 0
        self.metrics: Mapping[str, float] = {}
        self.history: dict[str, deque[float]] = {}
        self.evaluations: list[EvalDone] = []
        self.services: dict[str, ServiceState] = {}
        self.events: deque[tuple[float, Notice]] = deque(maxlen=EVENTS_SHOWN)
        self._seconds: deque[float] = deque(maxlen=PACE_OVER)

    def take(self, event: Event) -> None:
        """Takes one event in."""
        if isinstance(event, RunStarted):
            self.run, self.iteration = event, event.first_iteration - 1
        elif isinstance(event, ServiceState):
            if event.state:
                self.services[event.service] = event
            else:
                self.services.pop(event.service, None)
        elif isinstance(event, IterationDone):
            self.iteration, self.metrics = event.iteration, event.metrics
            self._seconds.append(event.metrics.get(names.ITERATION_SECONDS, 0.0))
            for name, value in event.metrics.items():
                self.history.setdefault(name, deque(maxlen=HISTORY)).append(value)
        elif isinstance(event, EvalDone):
            self.evaluations = [e for e in self.evaluations if e.iteration != event.iteration] + [event]
        else:
            self.events.append((self.clock(), event))

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the run's end at the pace of the last iterations; None before there is a pace."""
        if not any(self._seconds) or not self.run.iterations:
            return None
        return sum(self._seconds) / len(self._seconds) * (self.run.iterations - self.iteration)

    @property
    def parts(self) -> list[str]:
        """The reward's metrics, the mean first."""
        parts = sorted(name for name in self.metrics if name.startswith("reward/") and name not in NOT_PARTS)
        return ([names.REWARD_MEAN] if names.REWARD_MEAN in self.metrics else []) + parts


def iteration_line(progress: Progress, replayed: bool = False) -> str:
    """An iteration in one line: reward and parts, length, tokens/s, seconds, overhead, time left."""
    metrics, total = progress.metrics, progress.run.iterations
    pieces = [f"iteration {progress.iteration:>{len(str(total))}}/{total}" + (" (again)" if replayed else "")]
    pieces += [f"{_short(name)} {metrics[name]:.3f}" for name in progress.parts]
    if names.REWARD_MEAN not in metrics and names.LOSS in metrics:
        pieces.append(f"loss {metrics[names.LOSS]:.4f}")
    for name, form in (
        (names.LENGTH_MEAN, "length {:.1f}"),
        (names.ROLLOUT_TOKENS_PER_S, "{:,.0f} tokens/s"),
        (names.ITERATION_SECONDS, "{:.1f} s"),
    ):
        if name in metrics:
            pieces.append(form.format(metrics[name]))
    serving, desired = (metrics.get(name, 1.0) for name in (names.ENGINES_SERVING, names.ENGINES_DESIRED))
    if max(serving, desired) > 1:
        pieces.append(f"{serving:.0f} engines" + (f" of {desired:.0f}" if serving != desired else ""))
    if metrics.get(names.STALENESS_DROPPED):
        pieces.append(f"{metrics[names.STALENESS_DROPPED]:.0f} dropped as stale")
    if names.OVERHEAD_SHARE in metrics:
        pieces.append(f"overhead {100 * metrics[names.OVERHEAD_SHARE]:.1f} %")
    if progress.remaining_s is not None:
        pieces.append(f"{duration(progress.remaining_s)} left")
    return "  ".join(pieces)


class Display:
    """Shows a run's events: live on a terminal, as lines elsewhere. A context manager; ``update`` is the event sink.

    Args:
        stream: where to; None is stdout.
        live: whether to draw; None draws where ``stream`` is a terminal.
        quiet: shows warnings and errors only.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        live: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._secrets = secret_values(os.environ)
        self._progress = Progress(clock)
        self._lock = threading.Lock()
        self._live: Live | None = None
        if not quiet and (self._console.is_terminal if live is None else live):
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    @property
    def is_live(self) -> bool:
        """Whether a picture is drawn."""
        return self._live is not None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, event: Event) -> None:
        """Takes an event; from any thread. Secrets of the environment are not shown."""
        if isinstance(event, Notice):
            event = replace(event, text=redact(event.text, self._secrets))
        with self._lock:
            self._progress.take(event)
            line = self._line(event)
        if line is not None:
            self._console.print(line)

    def _line(self, event: Event) -> Text | None:
        """What a display without a picture prints for the event; a live one prints what must not scroll away."""
        if isinstance(event, Notice):
            shown = event.level != "info" if self._quiet or self._live is not None else True
            return Text(event.text, style=LEVEL_STYLE[event.level]) if shown else None
        if self._quiet or self._live is not None:
            return None
        if isinstance(event, RunStarted):
            going_on = f", from iteration {event.first_iteration}" if event.first_iteration > 1 else ""
            return Text(f"run {event.run}: {event.iterations} iterations{going_on}, in {event.place or 'its store'}")
        if isinstance(event, IterationDone):
            return Text(iteration_line(self._progress, event.replayed))
        if isinstance(event, EvalDone):
            return Text(f"evaluation after iteration {event.iteration}: {evaluation_line(event.metrics)}")
        return None  # ServiceState: a picture shows it; among lines, the log's notices of long waits suffice

    def _render(self) -> RenderableType:
        with self._lock:
            return render(self._progress)


def render(progress: Progress) -> RenderableType:
    """The live picture."""
    run, now = progress.run, progress.clock()
    head = Table.grid(expand=True, padding=(0, 2))
    head.add_column(ratio=1)
    head.add_column(justify="right")
    left = f"{duration(progress.remaining_s)} left" if progress.remaining_s is not None else "starting"
    head.add_row(
        ProgressBar(total=max(run.iterations, 1), completed=progress.iteration),
        f"{progress.iteration}/{run.iterations}  {duration(now - progress.started_s)}, {left}",
    )
    body = Table.grid(expand=True, padding=(0, 2))
    body.add_column(ratio=1)
    body.add_column(ratio=1)
    body.add_row(_measures(progress), _services(progress, now))
    lines = [
        Text(f"{duration(at - progress.started_s):>8}  {notice.text}", style=LEVEL_STYLE[notice.level])
        for at, notice in progress.events
    ]
    parts: list[RenderableType] = [head, Text(), body]
    parts += [Text(), _accuracy(progress)] if progress.evaluations else []
    parts += [Text(), *lines] if lines else []
    return Panel(Group(*parts), title=Text(run.run or "steadyhelm"))


def _measures(progress: Progress) -> Table:
    table = Table.grid(padding=(0, 2))
    for name in [
        *progress.parts,
        names.LOSS,
        names.LENGTH_MEAN,
        names.ROLLOUT_TOKENS_PER_S,
        names.LEARNER_TOKENS_PER_S,
        names.ITERATION_SECONDS,
        names.OVERHEAD_SHARE,
        names.LEARNER_WAIT,
        names.STALENESS_MEAN,
        names.STALENESS_DROPPED,
    ]:
        if name not in progress.metrics or (name in STALENESS and not any(progress.history[name])):
            continue
        value = progress.metrics[name]
        shown = f"{100 * value:.1f} %" if name in (names.OVERHEAD_SHARE, names.LEARNER_WAIT) else _number(value)
        style = "bold" if name == names.REWARD_MEAN else ""
        bars = Text(sparkline(list(progress.history[name])), style="cyan")
        table.add_row(Text(_short(name), style=style), Text(shown, style=style, justify="right"), bars)
    return table


def _accuracy(progress: Progress) -> Table:
    table = Table.grid(padding=(0, 2))
    for event in progress.evaluations[-4:]:
        table.add_row(f"after {event.iteration}", evaluation_line(event.metrics))
    return table


def _services(progress: Progress, now: float) -> Table:
    table = Table.grid(padding=(0, 2))
    for service in sorted(progress.services):
        state = progress.services[service]
        style = "yellow" if state.waiting else "green"
        table.add_row(Text(service), Text(state.state, style=style), Text(duration(now - state.since_s), style="dim"))
    return table


def _short(name: str) -> str:
    group, _, rest = name.partition("/")
    known = {
        names.REWARD_MEAN: "reward",
        names.ROLLOUT_TOKENS_PER_S: "rollout tokens/s",
        names.LEARNER_TOKENS_PER_S: "learner tokens/s",
        names.ITERATION_SECONDS: "seconds",
        names.OVERHEAD_SHARE: "overhead",
        names.LEARNER_WAIT: "learner waits",
        names.LENGTH_MEAN: "length",
        names.STALENESS_MEAN: "versions behind",
        names.STALENESS_DROPPED: "dropped as stale",
    }
    return known.get(name, rest.replace("_", " ") if group else name)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
