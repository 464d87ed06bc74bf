"""What the stand-in for KubeRay does about a RayCluster, step by step, without a cluster."""

from typing import Any

import pytest

from tests.cluster.stand_in.objects import head_pod, worker_pod
from tests.cluster.stand_in.reconcile import name, status, steps

Manifest = dict[str, Any]
NOW = "2026-01-01T00:00:00Z"


def cluster(*, scales_itself: bool = True, group: Manifest | None = None, **spec: Any) -> Manifest:
    template = {"spec": {"containers": [{"name": "ray", "image": "i"}]}}
    rollout = {"groupName": "rollout", "replicas": 2, "minReplicas": 1, "maxReplicas": 3, "template": template}
    return {
        "metadata": {"name": "rl", "namespace": "ns", "uid": "u", "generation": 1},
        "spec": {
            "enableInTreeAutoscaling": scales_itself,
            "headGroupSpec": {"template": template},
            "workerGroupSpecs": [rollout | (group or {})],
            **spec,
        },
    }


def running(made: Manifest, number: int) -> Manifest:
    """A pod as it is once it runs."""
    pod = made | {"metadata": made["metadata"] | {"name": f"{made['metadata']['generateName']}{number}"}}
    conditions = [{"type": "Ready", "status": "True"}]
    return pod | {"status": {"phase": "Running", "conditions": conditions, "podIP": f"10.0.0.{number}"}}


def head(of: Manifest) -> Manifest:
    return running(head_pod(of), 0)


def workers(of: Manifest, count: int) -> list[Manifest]:
    return [running(worker_pod(of, of["spec"]["workerGroupSpecs"][0], index), index) for index in range(count)]


def test_a_new_cluster_gets_a_head_and_its_replicas():
    todo = steps(cluster(), [])
    made = [pod["metadata"]["generateName"] for pod in todo.create]
    assert made == ["rl-head-", "rl-rollout-worker-", "rl-rollout-worker-"]
    indices = [pod["metadata"]["labels"].get("ray.io/worker-group-replica-index") for pod in todo.create]
    assert indices == [None, "0", "1"]
    assert todo.delete == []


def test_a_cluster_that_is_as_it_should_be_is_left_alone():
    it = cluster()
    todo = steps(it, [head(it), *workers(it, 2)])
    assert (todo.create, todo.delete) == ([], [])


@pytest.mark.parametrize(("replicas", "wanted"), [(0, 1), (1, 1), (3, 3), (7, 3)])
def test_replicas_stay_between_the_least_and_the_most(replicas: int, wanted: int):
    it = cluster(group={"replicas": replicas})
    assert len(steps(it, [head(it)]).create) == wanted


def test_the_autoscaler_names_the_pods_that_go():
    it = cluster(group={"replicas": 1})
    pods = workers(it, 2)
    assert steps(it, [head(it), *pods]).delete == []
    it["spec"]["workerGroupSpecs"][0]["scaleStrategy"] = {"workersToDelete": [name(pods[1])]}
    assert steps(it, [head(it), *pods]).delete == [name(pods[1])]


def test_without_an_autoscaler_the_oldest_go():
    it = cluster(scales_itself=False, group={"replicas": 1})
    pods = workers(it, 2)
    assert steps(it, [head(it), *pods]).delete == [name(pods[0])]


def test_a_lowered_maximum_is_enforced():
    it = cluster(group={"replicas": 1, "maxReplicas": 1})
    assert len(steps(it, [head(it), *workers(it, 3)]).delete) == 2


def test_a_group_stands_still_while_a_pod_of_it_ends():
    it = cluster(group={"replicas": 3})
    pods = workers(it, 2)
    pods[0]["metadata"]["deletionTimestamp"] = NOW
    todo = steps(it, [head(it), *pods])
    assert (todo.create, todo.delete) == ([], [])


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_what_has_ended_is_deleted_and_then_made_again(phase: str):
    it = cluster()
    pods = [head(it), *workers(it, 2)]
    pods[0]["status"]["phase"] = pods[1]["status"]["phase"] = phase
    assert steps(it, pods).delete == [name(pods[0]), name(pods[1])]
    assert len(steps(it, pods[2:]).create) == 2


def test_a_pod_whose_ray_has_ended_is_replaced_though_another_container_of_it_runs():
    it = cluster()
    pods = [head(it), *workers(it, 2)]
    pods[0]["status"]["containerStatuses"] = [{"name": "ray", "state": {"terminated": {"exitCode": 1}}}]
    assert steps(it, pods).delete == [name(pods[0])]


def test_a_suspended_cluster_has_no_pods_and_says_so():
    it = cluster(suspend=True)
    pods = [head(it), *workers(it, 2)]
    assert sorted(steps(it, pods).delete) == sorted(map(name, pods))
    assert status(it, [], NOW)["state"] == "suspended"


def test_a_cluster_that_is_deleted_is_left_to_kubernetes():
    it = cluster()
    it["metadata"]["deletionTimestamp"] = NOW
    todo = steps(it, [])
    assert (todo.create, todo.delete) == ([], [])


def test_pods_of_a_group_that_is_no_more_go():
    it = cluster()
    pods = [head(it), *workers(it, 2)]
    it["spec"]["workerGroupSpecs"] = []
    assert steps(it, pods).delete == [name(pod) for pod in pods[1:]]


def test_the_status_tells_of_the_head_and_of_workers():
    it = cluster()
    pods = [head(it), *workers(it, 2)]
    said = status(it, pods, NOW)
    conditions = {condition["type"]: condition["status"] for condition in said["conditions"]}
    assert conditions == {
        "HeadPodReady": "True",
        "RayClusterProvisioned": "True",
        "RayClusterSuspended": "False",
        "RayClusterSuspending": "False",
    }
    assert said["state"] == "ready"
    assert (said["desiredWorkerReplicas"], said["readyWorkerReplicas"]) == (2, 2)
    assert said["head"] == {
        "podName": "rl-head-0",
        "podIP": "10.0.0.0",
        "serviceIP": "10.0.0.0",
        "serviceName": "rl-head-svc",
    }


def test_a_status_that_stays_the_same_keeps_its_times():
    it = cluster()
    pods = [head(it), *workers(it, 2)]
    it["status"] = status(it, pods, NOW)
    assert status(it, pods, "2026-01-02T00:00:00Z") == it["status"]
