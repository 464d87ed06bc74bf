"""What holds for everything that the cluster's chart renders; each function says what does not."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

from tests.charts.objects import Manifest, Pod, groups, one, pods

RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
UNITS = {"": 1.0, "m": 1e-3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def quantity(text: str | int) -> float:
    """What Kubernetes reads in a quantity."""
    number, unit = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(text)).groups()
    return float(number) * UNITS[unit]


def faults(manifests: list[Manifest]) -> list[str]:
    """Everything that does not hold."""
    found = list(pods(manifests))
    return [
        *(fault for pod in found for check in (unrestricted, unmounted, overcommitted) for fault in check(pod)),
        *astray(manifests, found),
        *open_ports(manifests, found),
        *wrong_groups(manifests),
        *leaks(manifests),
    ]


def unrestricted(pod: Pod) -> Iterator[str]:
    """What Pod Security "restricted" refuses, and what else this chart promises."""
    security = pod.spec["securityContext"]
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield f"{pod.name} may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"{pod.name} has no seccomp profile"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"{pod.name} has {key}"
    for volume in pod.spec["volumes"]:
        if not volume.keys() - {"name"} <= RESTRICTED_VOLUMES:
            yield f"{pod.name}: volume {volume}"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield f"{pod.name} mounts a token of the Kubernetes API"
    for container in pod.containers:
        security = container.get("securityContext", {})
        wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        if security != wanted:
            yield f"{pod.name}/{container['name']}: {security}"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{pod.name}/{container['name']} has a port of the node"


def unmounted(pod: Pod) -> Iterator[str]:
    """Mounts without a volume, and names or paths that are there twice."""
    volumes = [volume["name"] for volume in pod.spec["volumes"]]
    claimed = {"data"} if pod.name.endswith("-s3-0") else set()
    if len(volumes) != len(set(volumes)):
        yield f"{pod.name}: volumes {volumes}"
    for container in pod.containers:
        mounts = container.get("volumeMounts", [])
        if {mount["name"] for mount in mounts} - set(volumes) - claimed:
            yield f"{pod.name}/{container['name']} mounts what is no volume"
        for names in ([mount["mountPath"] for mount in mounts], [env["name"] for env in container.get("env", [])]):
            if len(names) != len(set(names)):
                yield f"{pod.name}/{container['name']} has twice one of {names}"


def overcommitted(pod: Pod) -> Iterator[str]:
    """Containers that request more than their limit, or leave memory open."""
    for container in pod.containers:
        resources = container["resources"]
        if not {"cpu", "memory"} <= resources["requests"].keys() or "memory" not in resources["limits"]:
            yield f"{pod.name}/{container['name']}: {resources}"
        for name, limit in resources["limits"].items():
            if quantity(resources["requests"].get(name, 0)) > quantity(limit):
                yield f"{pod.name}/{container['name']} requests more {name} than its limit"


def selects(selector: dict[str, Any], pod: Pod) -> bool:
    return selector["matchLabels"].items() <= pod.labels.items()


def selectors(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The label selectors of pods of this namespace in a manifest."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Service":
        yield {"matchLabels": spec["selector"]}
    elif manifest["kind"] in {"PodDisruptionBudget", "PodMonitor", "StatefulSet"}:
        yield spec["selector"]
    elif manifest["kind"] == "NetworkPolicy":
        yield spec["podSelector"]
        rules = [*spec.get("ingress", []), *spec.get("egress", [])]
        peers = [peer for rule in rules for peer in (*rule.get("from", []), *rule.get("to", []))]
        yield from (peer["podSelector"] for peer in peers if "podSelector" in peer)


def astray(manifests: list[Manifest], found: list[Pod]) -> Iterator[str]:
    """Selectors that match no pod, and ports of Services and PodMonitors that no pod names."""
    for manifest in manifests:
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        for selector in selectors(manifest):
            if not any(selects(selector, pod) for pod in found):
                yield f"{name} selects nothing by {selector}"
        spec = manifest.get("spec", {})
        ports = [port["targetPort"] for port in spec.get("ports", [])] if manifest["kind"] == "Service" else []
        ports += [endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", [])]
        for port in ports:
            (selector,) = selectors(manifest)
            if not any(port in pod.ports for pod in found if selects(selector, pod)):
                yield f"{name}: no pod has the port {port}"


def open_ports(manifests: list[Manifest], found: list[Pod]) -> Iterator[str]:
    """Rules that let in more than ports which the pods name; all ports are for the cluster's own pods alone."""
    for policy in (m for m in manifests if m["kind"] == "NetworkPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        behind = [pod for pod in found if selects(spec["podSelector"], pod)]
        if set(spec["policyTypes"]) != {"Ingress", "Egress"}:
            yield f"{name} leaves a direction open"
        for rule in spec.get("ingress", []):
            own = [{"podSelector": spec["podSelector"]}]
            if not rule.get("from") or ("ports" not in rule and rule["from"] != own):
                yield f"{name} lets everything in: {rule}"
            for port in rule.get("ports", []):
                if not any(port["port"] in pod.ports for pod in behind):
                    yield f"{name} lets in {port}, which none of its pods names"
        for rule in spec.get("egress", []):
            if not rule.get("ports") and not all("podSelector" in peer for peer in rule["to"]):
                yield f"{name} lets everything out: {rule}"


def wrong_groups(manifests: list[Manifest]) -> Iterator[str]:
    """Groups of the RayCluster by which KubeRay, the autoscaler or the placement of actors would stumble."""
    cluster = one(manifests, "RayCluster")
    name = cluster["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,43}[a-z0-9])?", name):
        yield f"KubeRay refuses or cuts the name {name}"
    names = [group for group, _ in groups(cluster)]
    if len(names) != len(set(names)) or not len(names) <= 17:
        yield f"groups {names}"
    for group, spec in groups(cluster):
        pool = spec["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        if spec["labels"] != {"pool": pool} or [key for key in spec["resources"] if "pool" in key] != [f"pool_{pool}"]:
            yield f"group {group} of pool {pool}: {spec['labels']} {spec['resources']}"
        if group not in ("headgroup", pool, f"{pool}-spot"):
            yield f"group {group} is of pool {pool}"
        if {"num-cpus", "num-gpus", "memory", "resources", "labels"} & spec["rayStartParams"].keys():
            yield f"group {group}: KubeRay refuses these beside resources and labels: {spec['rayStartParams']}"
        limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = [int(amount) for resource, amount in limits.items() if resource != "memory"]
        if gpus != [int(amount) for resource, amount in spec["resources"].items() if resource == "GPU"]:
            yield f"group {group}: Ray and Kubernetes differ about GPUs"
        if group != "headgroup" and not spec["minReplicas"] <= spec["replicas"] <= spec["maxReplicas"]:
            yield f"group {group}: {spec['minReplicas']} ≤ {spec['replicas']} ≤ {spec['maxReplicas']} does not hold"
        if group.startswith("rollout") and spec["template"]["spec"]["terminationGracePeriodSeconds"] > 120:
            yield f"group {group} is frozen for minutes while a pod ends"


def leaks(manifests: list[Manifest]) -> Iterator[str]:
    """Values of Secrets that stand anywhere else."""
    rest = json.dumps([m for m in manifests if m["kind"] != "Secret"])
    for secret in (m for m in manifests if m["kind"] == "Secret"):
        for key, value in secret["data"].items():
            for line in base64.b64decode(value).decode().split():
                if len(line) >= 16 and line not in {"aws_access_key_id", "aws_secret_access_key"} and line in rest:
                    yield f"{key} of Secret {secret['metadata']['name']} stands outside of it"
