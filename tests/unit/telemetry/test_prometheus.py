import urllib.request

import pytest
from steadyhelm.telemetry.prometheus import LatestMetrics, exposition, serve_prometheus


def test_the_latest_values_are_exposed_with_their_meaning():
    latest = LatestMetrics("digits-1")
    latest.update({"reward/mean": 1.0, "run/restarts": 2.0, "seconds/rollout": 3.0, "seconds/reward": 0.5})
    latest.update({"reward/mean": 1.25})
    assert exposition(latest).splitlines() == [
        "# HELP steadyhelm_reward_mean Mean total reward of the valid samples",
        "# TYPE steadyhelm_reward_mean gauge",
        'steadyhelm_reward_mean{run="digits-1"} 1.25',
        "# HELP steadyhelm_run_restarts_total Actors that this driver replaced and learner groups that it started "
        "again",
        "# TYPE steadyhelm_run_restarts_total counter",
        'steadyhelm_run_restarts_total{run="digits-1"} 2.0',
        "# HELP steadyhelm_phase_seconds Seconds in which a phase was under way",
        "# TYPE steadyhelm_phase_seconds gauge",
        'steadyhelm_phase_seconds{phase="reward",run="digits-1"} 0.5',
        'steadyhelm_phase_seconds{phase="rollout",run="digits-1"} 3.0',
    ]


def test_a_name_of_no_group_is_refused_and_changes_nothing():
    latest = LatestMetrics("r")
    with pytest.raises(KeyError):
        latest.update({"reward/mean": 1.0, "nonsense": 2.0})
    assert exposition(latest) == ""


def test_a_scrape_is_answered_and_a_taken_port_is_an_error():
    latest = LatestMetrics("r")
    latest.update({"reward/mean": 1.0})
    port, stop = serve_prometheus(latest, 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert 'steadyhelm_reward_mean{run="r"} 1.0' in answer.read().decode()
        with pytest.raises(OSError, match="in use"):
            serve_prometheus(latest, port)
    finally:
        stop()
