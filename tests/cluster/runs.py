"""Runs of these tests: run files, TrainingRuns, and waiting for what their status says."""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import yaml
from steadyhelm.data.code_ref import call_code

from tests.cluster.api import ApiError, Manifest
from tests.cluster.kubernetes import Kubernetes
from tests.cluster.release import DRIVER, NAMESPACE, RELEASE, ROOT, STORE, token

RUNS = f"/apis/steadyhelm.dev/v1alpha1/namespaces/{NAMESPACE}/trainingruns"
EVENTS = f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events"
CLUSTER = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters/{RELEASE}"
WORKLOAD = ROOT / "workloads" / "r1_reward"
STORY = "story"
"""Id of the run that is submitted, and then handed to the operator."""
CODE = ("digits.py", "tiny_model.py")
Status = dict[str, Any]


def digits_run(iterations: int) -> Manifest:
    """The digits task's run file without cold start and evaluations, with batches of 64 and one of each service."""
    run: Manifest = yaml.safe_load((WORKLOAD / "digits.yaml").read_text())
    run["model"] = {"factory": "tiny_model.py:build", "dtype": "float32"}
    del run["data"]["eval"]
    run["rollout"] |= {"engine": {"type": "transformers", "batch": 64}, "replicas": 1}
    run["learner"] |= {"train_batch": 64, "replicas": 1}
    run["schedule"] = {"iterations": iterations, "prompts_per_iteration": 64, "checkpoint_every": 4}
    run["store"] = {"uri": STORE}
    return run


@cache
def digits_records() -> int:
    """Size of the digits task's training data."""
    return len(call_code(WORKLOAD, "digits.py:train_pairs"))


def training_run(name: str, run: Manifest, **spec: Any) -> Manifest:
    """A TrainingRun of the digits task on the release's cluster."""
    files = {file: (WORKLOAD / file).read_text() for file in CODE}
    return {
        "apiVersion": "steadyhelm.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": {"cluster": {"name": RELEASE}, "files": files, "run": run, **spec},
    }


def own_cluster(kubernetes: Kubernetes, *groups: str, **pod: Any) -> Manifest:
    """A spec's cluster of its own: the release's head and groups, with fields of pods or their containers changed."""
    live = kubernetes.api.get(CLUSTER)
    assert live is not None
    spec = deepcopy(live["spec"]) | {"enableInTreeAutoscaling": False}
    spec.pop("autoscalerOptions", None)
    spec["workerGroupSpecs"] = [
        group | {"replicas": group["minReplicas"]} for group in spec["workerGroupSpecs"] if group["groupName"] in groups
    ]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        template = group["template"]["spec"]
        for field, value in pod.items():
            (template["containers"][0] if field in template["containers"][0] else template)[field] = value
    return {"template": {"spec": spec}}


def status(kubernetes: Kubernetes, name: str) -> Status:
    """What a TrainingRun's status says; empty before it says anything."""
    found: Status = (kubernetes.api.get(f"{RUNS}/{name}") or {}).get("status") or {}
    return found


def until(
    kubernetes: Kubernetes, name: str, what: str, holds: Callable[[Status], bool], *, seconds: float = 180
) -> Status:
    """The run's status, once it is so."""

    def found() -> Status | None:
        said = status(kubernetes, name)
        return said if said and holds(said) else None

    try:
        return kubernetes.until(found, f"{name}: {what}", seconds=seconds, namespace=NAMESPACE)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{yaml.safe_dump(status(kubernetes, name))}") from None


def document(kubernetes: Kubernetes) -> Status:
    """What the driver on the release's head says of itself; empty where none answers."""
    bearer = {"X-Ray-Authorization": f"Bearer {token(kubernetes)}"}
    try:
        said: Status = json.loads(kubernetes.api.call("GET", f"{DRIVER}/status", **bearer))
    except ApiError:
        return {}
    return said


def goes_on(kubernetes: Kubernetes, name: str, *, attempt: int, seconds: float = 180) -> Status:
    """The run's status, once that attempt runs, and its driver has got two iterations further meanwhile."""
    first: int | None = None

    def so(said: Status) -> bool:
        nonlocal first
        assert said["attempt"] <= attempt, said
        if said["phase"] != "Running" or said["attempt"] != attempt:
            return False
        driver = document(kubernetes)
        if driver.get("phase") != "running" or driver["run"] != name:
            return False
        first = driver["iteration"] if first is None else first
        return bool(driver["iteration"] >= first + 2)

    return until(kubernetes, name, f"attempt {attempt} is at work", so, seconds=seconds)


def events(kubernetes: Kubernetes, name: str) -> list[tuple[str, str]]:
    """Reason and text of every event about a TrainingRun."""
    found = kubernetes.api.items(EVENTS)
    return [(event["reason"], event["note"]) for event in found if event["regarding"]["name"] == name]


def delete(kubernetes: Kubernetes, name: str, *, seconds: float = 240) -> None:
    """Deletes a TrainingRun and waits until it is gone."""
    kubernetes.api.delete(f"{RUNS}/{name}")
    gone = f"{RUNS}/{name}"
    kubernetes.until(lambda: kubernetes.api.get(gone) is None, f"{name} is gone", seconds=seconds, namespace=NAMESPACE)
