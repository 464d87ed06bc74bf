"""What to do about a RayCluster, from what there is of it. Pure and level-triggered: asked again, it says the rest."""

from dataclasses import dataclass, field
from typing import Any

from tests.cluster.stand_in.objects import head_pod, worker_pod

Manifest = dict[str, Any]


@dataclass(slots=True)
class Steps:
    """Pods to make, and names of pods to delete."""

    create: list[Manifest] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)


def group_name(pod: Manifest) -> str:
    """Group of a pod; ``headgroup`` is the head's."""
    name: str = pod["metadata"]["labels"]["ray.io/group"]
    return name


def ending(pod: Manifest) -> bool:
    """Whether a pod is being deleted."""
    return "deletionTimestamp" in pod["metadata"]


def broken(pod: Manifest) -> bool:
    """Whether a pod has ended by itself, as one does whose Ray has ended."""
    if pod.get("status", {}).get("phase") in ("Failed", "Succeeded"):
        return True
    if pod["spec"].get("restartPolicy") != "Never":
        return False
    ray = pod["spec"]["containers"][0]["name"]
    states = pod.get("status", {}).get("containerStatuses", [])
    return any(state["name"] == ray and "terminated" in state.get("state", {}) for state in states)


def ready(pod: Manifest) -> bool:
    """Whether a pod runs and is ready."""
    conditions = pod.get("status", {}).get("conditions", [])
    return not ending(pod) and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def wanted(group: Manifest) -> int:
    """Pods that a worker group is to have."""
    if group.get("suspend"):
        return 0
    low, high = int(group.get("minReplicas", 0)), int(group.get("maxReplicas", 2**31 - 1))
    return min(max(int(group.get("replicas", low)), low), high)


def steps(cluster: Manifest, pods: list[Manifest]) -> Steps:
    """The next steps towards what the RayCluster says, from its pods in the order of their age."""
    found = Steps()
    if "deletionTimestamp" in cluster["metadata"]:
        return found  # Kubernetes collects what it owns
    if cluster["spec"].get("suspend"):
        found.delete = [name(pod) for pod in pods if not ending(pod)]
        return found
    heads = [pod for pod in pods if group_name(pod) == "headgroup"]
    if not heads:
        found.create.append(head_pod(cluster))
    found.delete += [name(pod) for pod in heads if broken(pod) and not ending(pod)]
    for group in cluster["spec"].get("workerGroupSpecs", []):
        members = [pod for pod in pods if group_name(pod) == group["groupName"]]
        if any(ending(pod) for pod in members):
            continue  # as KubeRay does: nothing happens in a group until what it deleted is gone
        _of_group(cluster, group, members, found)
    known = {"headgroup", *(group["groupName"] for group in cluster["spec"].get("workerGroupSpecs", []))}
    found.delete += [name(pod) for pod in pods if group_name(pod) not in known and not ending(pod)]
    return found


def _of_group(cluster: Manifest, group: Manifest, members: list[Manifest], found: Steps) -> None:
    scales_itself = cluster["spec"].get("enableInTreeAutoscaling", False)
    unhealthy = [name(pod) for pod in members if broken(pod)]
    if unhealthy:
        found.delete += unhealthy
        return
    named = set(group.get("scaleStrategy", {}).get("workersToDelete") or ()) & {name(pod) for pod in members}
    found.delete += sorted(named)
    left = [pod for pod in members if name(pod) not in named]
    surplus = len(left) - wanted(group)
    if surplus < 0 and not named:
        taken = {int(pod["metadata"]["labels"].get("ray.io/worker-group-replica-index", 0)) for pod in members}
        free = [index for index in range(len(taken) - surplus) if index not in taken]
        found.create += [worker_pod(cluster, group, index) for index in free[:-surplus]]
    elif surplus > 0 and (not scales_itself or group.get("suspend") or _above_limit(group, left)):
        found.delete += [name(pod) for pod in left[:surplus]]


def _above_limit(group: Manifest, left: list[Manifest]) -> bool:
    """A lowered maximum is enforced, whoever scales."""
    return len(left) > int(group.get("maxReplicas", 2**31 - 1))


def name(pod: Manifest) -> str:
    """The pod's name."""
    found: str = pod["metadata"]["name"]
    return found


def status(cluster: Manifest, pods: list[Manifest], now: str) -> Manifest:
    """The status that people, our charts' notes and our operator read. ``now`` is RFC 3339."""
    spec, before = cluster["spec"], cluster.get("status", {})
    groups = spec.get("workerGroupSpecs", [])
    heads = [pod for pod in pods if group_name(pod) == "headgroup" and not ending(pod)]
    workers = [pod for pod in pods if group_name(pod) != "headgroup" and not ending(pod)]
    suspended = bool(spec.get("suspend"))
    head_ready = any(ready(pod) for pod in heads)
    whole = head_ready and sum(ready(pod) for pod in workers) >= sum(wanted(group) for group in groups)
    held = {c["type"]: c for c in before.get("conditions", [])}
    provisioned = not suspended and (whole or held.get("RayClusterProvisioned", {}).get("status") == "True")
    said = {
        "HeadPodReady": (head_ready, "HeadPodRunningAndReady" if head_ready else "HeadPodNotReady"),
        "RayClusterProvisioned": (
            provisioned,
            "AllPodRunningAndReadyFirstTime" if provisioned else "RayClusterPodsProvisioning",
        ),
        "RayClusterSuspended": (suspended and not pods, "RayClusterSuspended"),
        "RayClusterSuspending": (suspended and bool(pods), "RayClusterSuspending"),
    }
    conditions = []
    for kind, (true, reason) in said.items():
        value = "True" if true else "False"
        same = held.get(kind, {}).get("status") == value
        since = held[kind]["lastTransitionTime"] if same else now
        conditions.append({"type": kind, "status": value, "reason": reason, "message": "", "lastTransitionTime": since})
    found: Manifest = {
        "observedGeneration": cluster["metadata"]["generation"],
        "conditions": conditions,
        "desiredWorkerReplicas": sum(wanted(group) for group in groups),
        "minWorkerReplicas": sum(int(group.get("minReplicas", 0)) for group in groups),
        "maxWorkerReplicas": sum(int(group.get("maxReplicas", 0)) for group in groups),
        "availableWorkerReplicas": sum(pod.get("status", {}).get("phase") == "Running" for pod in workers),
        "readyWorkerReplicas": sum(ready(pod) for pod in workers),
        "head": {"serviceName": f"{cluster['metadata']['name']}-head-svc"},
    }
    if heads:
        address = heads[0].get("status", {}).get("podIP", "")
        found["head"] |= {"podName": name(heads[0]), "podIP": address, "serviceIP": address}
    if suspended and not pods:
        found["state"] = "suspended"
    elif provisioned:
        found["state"] = "ready"
    return found
