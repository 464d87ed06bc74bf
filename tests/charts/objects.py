"""What a rendered chart consists of: manifests, and the pods that controllers make of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "charts" / "steadyhelm-cluster"
EXAMPLES = sorted((CLUSTER / "examples").glob("*.yaml"))

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod as its controller makes it; ``group`` is the worker group's (or ``headgroup``), empty for others."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    group: str = ""

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for c in self.spec["containers"] for port in c.get("ports", [])}


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only manifest of that kind (and name)."""
    (found,) = (m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"]))
    return found


def groups(cluster: Manifest) -> list[tuple[str, Manifest]]:
    """The head group and the worker groups of a RayCluster, by name."""
    spec = cluster["spec"]
    return [("headgroup", spec["headGroupSpec"]), *((group["groupName"], group) for group in spec["workerGroupSpecs"])]


def pods(manifests: list[Manifest]) -> Iterator[Pod]:
    """One pod of every template."""
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        if manifest["kind"] == "RayCluster":
            for group, spec in groups(manifest):
                yield _ray_pod(manifest, group, spec)
        elif manifest["kind"] == "StatefulSet":
            template = manifest["spec"]["template"]
            yield Pod(name=f"{name}-0", labels=template["metadata"]["labels"], spec=template["spec"])
        elif manifest["kind"] == "Pod":
            yield Pod(name=name, labels=manifest["metadata"]["labels"], spec=manifest["spec"])


def _ray_pod(cluster: Manifest, group: str, spec: Manifest) -> Pod:
    """What KubeRay makes of a group, as far as the chart's own objects depend on it."""
    name, head = cluster["metadata"]["name"], group == "headgroup"
    template = spec["template"]
    own = template["metadata"]["labels"] | spec["labels"]
    of_kuberay = {
        "app.kubernetes.io/created-by": "kuberay-operator",
        "app.kubernetes.io/name": "kuberay",
        "ray.io/cluster": name,
        "ray.io/group": group,
        "ray.io/identifier": f"{name}-{'head' if head else 'worker'}",
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": "head" if head else "worker",
    }
    assert not own.keys() & of_kuberay.keys(), "KubeRay's labels select its pods, the chart must leave them alone"
    pod = dict(template["spec"])
    if head and cluster["spec"]["enableInTreeAutoscaling"]:
        options = cluster["spec"]["autoscalerOptions"]
        image = pod["containers"][0]["image"]
        kept = {key: options[key] for key in ("resources", "securityContext", "env", "volumeMounts")}
        pod["containers"] = [*pod["containers"], {"name": "autoscaler", "image": image, **kept}]
    return Pod(name=f"{name}-{group}", labels=own | of_kuberay, spec=pod, group=group)
