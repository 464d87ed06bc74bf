import json
import math

import pytest
from steadyhelm.telemetry import MetricsLine, MetricsLog, join_segments


def test_lines_are_put_as_segments_of_the_attempt():
    put: dict[str, bytes] = {}
    log = MetricsLog(put.__setitem__, "digits/metrics", attempt=2)
    log.append(1, {"reward/mean": 0.1})
    log.append(2, {"reward/mean": 0.30000000000000004})
    assert log.flush() == "digits/metrics/2-0.jsonl"
    assert log.flush() is None
    log.append(3, {"learner/loss": math.nan}, replayed=True)
    assert log.flush() == "digits/metrics/2-1.jsonl"
    first, second = (json.loads(line) for line in put["digits/metrics/2-0.jsonl"].splitlines())
    assert (first["iteration"], first["attempt"], first["metrics"]) == (1, 2, {"reward/mean": 0.1})
    assert second["metrics"]["reward/mean"] == 0.30000000000000004
    third = json.loads(put["digits/metrics/2-1.jsonl"])
    assert third["metrics"] == {"learner/loss": None}
    assert third["replayed"] is True


def test_a_put_that_fails_keeps_the_lines():
    put: dict[str, bytes] = {}

    def full(key: str, data: bytes) -> None:
        raise OSError("no space left")

    log = MetricsLog(full, "m", attempt=1)
    log.append(1, {"reward/mean": 1.0})
    with pytest.raises(OSError, match="no space left"):
        log.flush()
    log._put = put.__setitem__
    assert log.flush() == "m/1-0.jsonl"


def segment(*lines: tuple[int, int, dict[str, float]]) -> bytes:
    made = [MetricsLine(iteration=i, attempt=a, time="2026-01-01T00:00:00.000Z", metrics=m) for i, a, m in lines]
    return "".join(line.to_json() + "\n" for line in made).encode()


def test_the_last_attempt_wins_for_each_iteration():
    joined = join_segments(
        {
            "r/metrics/10-0.jsonl": segment((2, 10, {"x": 10.0}), (3, 10, {"x": 10.5})),
            "r/metrics/2-0.jsonl": segment((1, 2, {"x": 2.0}), (2, 2, {"x": 2.5, "y": 1.0})),
            "r/metrics/2-1.jsonl": segment((3, 2, {"x": 2.75})),
        }
    )
    assert [(line.iteration, line.attempt, line.metrics) for line in joined] == [
        (1, 2, {"x": 2.0}),
        (2, 10, {"x": 10.0}),
        (3, 10, {"x": 10.5}),
    ]


def test_lines_of_one_attempt_and_iteration_are_merged_in_the_order_of_writing():
    joined = join_segments(
        {
            "r/metrics/1-10.jsonl": segment((5, 1, {"reward/mean": 3.0})),
            "r/metrics/1-9.jsonl": segment((5, 1, {"reward/mean": 2.0}), (5, 1, {"eval/accuracy": 0.5})),
        }
    )
    assert [line.metrics for line in joined] == [{"reward/mean": 3.0, "eval/accuracy": 0.5}]


def test_an_evaluation_stays_where_a_later_attempt_steps_its_iteration_again_and_replaces_nothing():
    joined = join_segments(
        {
            "r/metrics/1-0.jsonl": segment((5, 1, {"reward/mean": 1.0, "x": 1.0}), (5, 1, {"eval/accuracy": 0.5})),
            "r/metrics/2-0.jsonl": segment((4, 2, {"eval/accuracy": 0.25}), (5, 2, {"reward/mean": 2.0})),
            "r/metrics/1-1.jsonl": segment((4, 1, {"reward/mean": 4.0})),
        }
    )
    assert [(line.iteration, line.attempt, line.metrics) for line in joined] == [
        (4, 1, {"reward/mean": 4.0, "eval/accuracy": 0.25}),
        (5, 2, {"reward/mean": 2.0, "eval/accuracy": 0.5}),
    ]


def test_a_value_that_is_not_finite_comes_back_as_nan():
    line = MetricsLine.parse(MetricsLine(iteration=1, attempt=1, time="", metrics={"x": math.inf}).to_json())
    assert math.isnan(line.metrics["x"])
