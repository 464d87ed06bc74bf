"""Runs the stand-in for KubeRay: ``python -m tests.cluster.stand_in SOCKET``, where `kubectl proxy` serves SOCKET."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.cluster.api import Api, ApiError
from tests.cluster.stand_in.objects import autoscaler_rights, head_service, secret
from tests.cluster.stand_in.reconcile import broken, name, status, steps

Manifest = dict[str, Any]

PERIOD_S = 0.5
CLUSTERS = "/apis/ray.io/v1/rayclusters"


def collection(manifest: Manifest) -> str:
    """Path of the collection that an object is created in."""
    version, kind = manifest["apiVersion"], manifest["kind"].lower()
    root = f"/api/{version}" if version == "v1" else f"/apis/{version}"
    return f"{root}/namespaces/{manifest['metadata']['namespace']}/{kind}s"


def tend(api: Api, cluster: Manifest, pods: list[Manifest], now: str) -> None:
    """Takes the next steps about one RayCluster, and says how it is."""
    namespace = cluster["metadata"]["namespace"]
    place = f"/api/v1/namespaces/{namespace}/pods"
    seen = cluster.get("status", {}).get("observedGeneration") == cluster["metadata"]["generation"]
    if not seen and "deletionTimestamp" not in cluster["metadata"]:
        for manifest in filter(None, [*autoscaler_rights(cluster), head_service(cluster), secret(cluster)]):
            api.create(collection(manifest), manifest)
    todo = steps(cluster, pods)
    for pod in todo.delete:
        say(f"{namespace}/{pod} is deleted")
        api.delete(f"{place}/{pod}")
    for pod in todo.create:
        say(f"{namespace}/{pod['metadata']['generateName']}* is made")
        api.create(place, pod)
    found = status(cluster, pods, now)
    before = {key: cluster.get("status", {}).get(key) for key in found}
    if found != before:
        path = f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters/{cluster['metadata']['name']}/status"
        api.merge(path, {"status": found | {"lastUpdateTime": now}})


def say(line: str) -> None:
    """For whoever reads the log."""
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)


def main() -> None:
    """Tends every RayCluster, until the process is ended or the API server is gone for a minute."""
    api = Api(Path(sys.argv[1]))
    failures = 0
    while failures * PERIOD_S < 60:
        try:
            for cluster in api.items(CLUSTERS):
                place = f"/api/v1/namespaces/{cluster['metadata']['namespace']}/pods"
                pods = api.items(place, **{"ray.io/cluster": cluster["metadata"]["name"]})
                pods.sort(key=lambda pod: (pod["metadata"]["creationTimestamp"], name(pod)))
                for pod in filter(broken, pods):
                    say(f"{name(pod)} has ended: {pod.get('status', {}).get('containerStatuses')}")
                tend(api, cluster, pods, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
            failures = 0
        except ApiError as error:
            say(str(error))
            failures = failures + 1 if error.code == 0 else 0
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    main()
