"""Where a driver's metrics are read."""

import socket
import urllib.request

import pytest
from steadyhelm.config import RunFile
from steadyhelm.driver import METRICS_ADDRESS, _scraped
from steadyhelm.telemetry import Event, IterationDone, Notice


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_the_environment_says_where_metrics_are_read(run_file: RunFile, monkeypatch: pytest.MonkeyPatch):
    port = free_port()
    monkeypatch.setenv(METRICS_ADDRESS, f"127.0.0.1:{port}")
    told: list[Event] = []
    with _scraped(run_file, "digits-1", told.append) as tell:
        tell(IterationDone(iteration=1, metrics={"reward/mean": 1.5}, replayed=False))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert 'steadyhelm_reward_mean{run="digits-1"} 1.5' in answer.read().decode()
    assert [type(event) for event in told] == [IterationDone]


def test_the_second_run_of_a_pod_goes_on_unseen_by_prometheus(run_file: RunFile, monkeypatch: pytest.MonkeyPatch):
    port = free_port()
    monkeypatch.setenv(METRICS_ADDRESS, f"127.0.0.1:{port}")
    told: list[Event] = []
    with _scraped(run_file, "first", told.append), _scraped(run_file, "second", told.append) as tell:
        tell(IterationDone(iteration=1, metrics={"reward/mean": 1.5}, replayed=False))
    notice, done = told
    assert isinstance(notice, Notice)
    assert notice.text.startswith(f"Prometheus does not see this run: {METRICS_ADDRESS} 127.0.0.1:{port} is taken")
    assert isinstance(done, IterationDone)


def test_the_port_of_the_run_file_counts_first(run_file: RunFile, monkeypatch: pytest.MonkeyPatch):
    port, other = free_port(), free_port()
    monkeypatch.setenv(METRICS_ADDRESS, f"127.0.0.1:{other}")
    run = run_file.model_copy(update={"runtime": run_file.runtime.model_copy(update={"metrics_port": port})})
    with _scraped(run, "r", lambda event: None):
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", other), 5)
