"""A TrainingRun on a real Kubernetes: it trains, outlives its head, rests and goes on, and leaves nothing behind."""

from typing import Any

import pytest

from tests.cluster.api import Manifest
from tests.cluster.kubernetes import Kubernetes
from tests.cluster.release import CHART, NAMESPACE, RELEASE, one_running, smoke_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

RUNS = f"/apis/steadyhelm.dev/v1alpha1/namespaces/{NAMESPACE}/trainingruns"


def a_run(name: str, **run: Any) -> Manifest:
    return {
        "apiVersion": "steadyhelm.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": {
            "cluster": {"name": RELEASE},
            "files": {"smoke.py": (CHART / "files" / "smoke" / "smoke.py").read_text()},
            "run": smoke_run(name, iterations=300) | run,
        },
    }


def until(kubernetes: Kubernetes, name: str, what: str, seconds: float = 240, **wanted: Any) -> Manifest:
    """The run's status, once it has all of ``wanted``; a number is the least that will do."""

    def found() -> Manifest | None:
        status = ((kubernetes.api.get(f"{RUNS}/{name}") or {}).get("status")) or {}
        for field, value in wanted.items():
            here = status.get(field, 0 if isinstance(value, int) else None)
            if here < value if isinstance(value, int) else here != value:
                return None
        return status

    try:
        return kubernetes.until(found, what, seconds=seconds, namespace=NAMESPACE)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{kubernetes.api.get(f'{RUNS}/{name}')}") from None


def test_a_training_run_outlives_its_head_rests_and_goes_on(kubernetes: Kubernetes, operator: None):
    kubernetes.api.create(RUNS, a_run("kept"))
    until(kubernetes, "kept", "iterations are behind", phase="Running", iteration=2)

    head = one_running(kubernetes, "headgroup")["metadata"]["name"]
    kubernetes.api.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/{head}", grace_s=0)
    lost = until(kubernetes, "kept", "a second attempt runs", phase="Running", attempt=2, seconds=300)
    assert lost["attempts"][0]["outcome"] == "Lost"

    kubernetes.api.merge(f"{RUNS}/kept", {"spec": {"suspend": True}})
    rests = until(kubernetes, "kept", "it rests", phase="Suspended")
    kubernetes.api.merge(f"{RUNS}/kept", {"spec": {"suspend": False}})
    until(kubernetes, "kept", "it goes on", phase="Running", attempt=3, iteration=rests["iteration"] + 1)

    kubernetes.api.delete(f"{RUNS}/kept")
    kubernetes.until(lambda: kubernetes.api.get(f"{RUNS}/kept") is None, "it is gone", seconds=240, namespace=NAMESPACE)


def test_a_bad_run_file_is_named_within_a_minute(kubernetes: Kubernetes, operator: None):
    kubernetes.api.create(RUNS, a_run("wrong", model={"factory": "nowhere.py:model", "dtype": "float32"}))
    told = until(kubernetes, "wrong", "it is refused", seconds=60, phase="Failed")
    assert told["reason"] == "BadRunFile"
    assert "nowhere.py" in told["message"]
    kubernetes.api.delete(f"{RUNS}/wrong")
    kubernetes.until(lambda: kubernetes.api.get(f"{RUNS}/wrong") is None, "it is gone", seconds=60)
