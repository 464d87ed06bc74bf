import io

import pytest
from rich.console import Console
from steadyhelm.display import Display, Progress, duration, render, sparkline
from steadyhelm.telemetry import EvalDone, IterationDone, Notice, RunStarted, ServiceState

METRICS = {
    "reward/mean": 1.25,
    "reward/std": 0.5,
    "reward/valid_rate": 1.0,
    "reward/choice": 0.75,
    "reward/format": 1.0,
    "rollout/length_mean": 36.25,
    "rollout/tokens_per_s": 5123.4,
    "seconds/iteration": 2.5,
    "overhead/share": 0.021,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(*events, **options) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Display(stream, clock=clock, **options) as display:
        for event in events:
            display.update(event)
            clock.now += 5.0
    return stream.getvalue().splitlines()


def test_without_a_terminal_an_iteration_is_one_line():
    shown = lines(
        RunStarted(run="digits-1", iterations=60, place="runs/digits-1"),
        ServiceState(service="learner", state="waits for batch 1", since_s=0.0, waiting=True),
        IterationDone(iteration=1, metrics=METRICS),
        IterationDone(iteration=2, metrics=METRICS, replayed=True),
        EvalDone(iteration=2, metrics={"eval/accuracy": 0.8, "eval/accuracy_low": 0.75, "eval/accuracy_high": 0.85}),
        Notice(text="checkpoint [bold]2[/bold]"),
    )
    assert shown == [
        "run digits-1: 60 iterations, in runs/digits-1",
        "iteration  1/60  reward 1.250  choice 0.750  format 1.000  length 36.2  5,123 tokens/s  2.5 s  "
        "overhead 2.1 %  2:28 left",
        "iteration  2/60 (again)  reward 1.250  choice 0.750  format 1.000  length 36.2  5,123 tokens/s  2.5 s  "
        "overhead 2.1 %  2:25 left",
        "evaluation after iteration 2: accuracy 80.0 % [75.0, 85.0]",
        "checkpoint [bold]2[/bold]",
    ]


def test_staleness_is_shown_where_there_is_some():
    old = {**METRICS, "staleness/mean": 0.875, "staleness/dropped": 3.0}
    (line,) = lines(IterationDone(iteration=1, metrics=old))
    assert "3 dropped as stale" in line
    for metrics, shown in ((old, True), (METRICS | {"staleness/mean": 0.0}, False)):
        progress = Progress(Clock())
        progress.take(IterationDone(iteration=1, metrics=metrics))
        console = Console(file=io.StringIO(), width=120)
        console.print(render(progress))
        assert ("versions behind" in console.file.getvalue()) is shown


def test_a_run_without_rewards_shows_its_loss():
    shown = lines(
        RunStarted(run="sft", iterations=3),
        IterationDone(iteration=1, metrics={"learner/loss": 0.5, "seconds/iteration": 5.0}),
    )
    assert shown[1] == "iteration 1/3  loss 0.5000  5.0 s  0:10 left"


def test_quiet_shows_warnings_and_errors_only():
    shown = lines(
        RunStarted(run="digits", iterations=3),
        IterationDone(iteration=1, metrics=METRICS),
        Notice(text="saved"),
        Notice(text="an engine was lost", level="warning"),
        quiet=True,
    )
    assert shown == ["an engine was lost"]


def test_the_picture_shows_iteration_reward_accuracy_and_what_each_service_does_and_since_when():
    clock = Clock()
    progress = Progress(clock)
    progress.take(RunStarted(run="digits-1", iterations=60))
    for iteration in (1, 2):
        clock.now += 10.0
        progress.take(IterationDone(iteration=iteration, metrics=METRICS))
    progress.take(EvalDone(iteration=2, metrics={"eval/accuracy": 0.8}))
    progress.take(
        ServiceState(service="learner", state="waits for the batch of iteration 3", since_s=53.0, waiting=True)
    )
    progress.take(Notice(text="checkpoint 2"))
    stream = io.StringIO()
    Console(file=stream, width=120).print(render(progress))
    picture = stream.getvalue()
    for piece in ("2/60", "0:20, 2:25 left", "1.250", "5,123", "2.1 %", "accuracy 80.0 %", "checkpoint 2"):
        assert piece in picture
    assert "learner  waits for the batch of iteration 3  1:07" in picture


def test_a_live_display_draws_and_keeps_warnings_above_the_picture():
    stream = io.StringIO()
    with Display(stream, live=True) as display:
        assert display.is_live
        display.update(RunStarted(run="digits-1", iterations=60))
        display.update(Notice(text="an engine was lost", level="warning"))
    assert "digits-1" in stream.getvalue()
    assert "an engine was lost" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (754, "12:34"), (3723, "1:02:03"), (-1, "0:00")])
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_spark_lines_span_least_to_greatest_and_leave_gaps():
    assert sparkline([0.0, float("nan"), 1.0, 0.5]) == "▁ █▅"
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([float("nan")]) == ""
