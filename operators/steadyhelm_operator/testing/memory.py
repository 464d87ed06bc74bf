"""A Kubernetes API in memory."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from steadyhelm_operator.client import ConflictError, MissingError
from steadyhelm_operator.state import ClusterView, stamp

Name = tuple[str, str]


class MemoryKubernetes:
    """The part of the Kubernetes API that the operator uses, in memory: versions grow, writes are under conditions.

    Args:
        clock: the time, which is when a cluster was made.
    """

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self.runs: dict[Name, dict[str, Any]] = {}
        self.clusters: dict[Name, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.secrets: dict[tuple[str, str, str], str] = {}
        self.pod_list: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.watchers: list[Callable[[str, str, dict[str, Any]], None]] = []
        self._versions = itertools.count(1)
        self._lock = threading.RLock()

    def put(self, kind: str, body: Mapping[str, Any], verb: str = "MODIFIED") -> dict[str, Any]:
        """Keeps a ``run`` or a ``cluster`` as a user or KubeRay would write it; watchers are told."""
        with self._lock:
            made = copy.deepcopy(dict(body))
            metadata = made["metadata"]
            metadata["resourceVersion"] = str(next(self._versions))
            name = metadata["namespace"], metadata["name"]
            table = self.runs if kind == "run" else self.clusters
            gone = "deletionTimestamp" in metadata and not metadata.get("finalizers")
            if gone:
                table.pop(name, None)
            else:
                table[name] = made
            for tell in self.watchers:
                tell(kind, "DELETED" if gone else verb, copy.deepcopy(made))
            if gone and kind == "run":
                self._collect(metadata["uid"])
            return copy.deepcopy(made)

    def _collect(self, uid: str) -> None:
        for body in list(self.clusters.values()):
            if any(owner["uid"] == uid for owner in body["metadata"].get("ownerReferences", ())):
                self.put("cluster", {**body, "metadata": {**body["metadata"], "deletionTimestamp": "now"}})

    def run(self, namespace: str, name: str) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("GET run")
        return self._found(self.runs, namespace, name)

    def write_status(self, namespace: str, name: str, version: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("PATCH status")
        with self._lock:
            body = self._found(self.runs, namespace, name, version)
            return self.put("run", {**body, "status": _merged(body.get("status") or {}, patch)})

    def write_finalizers(self, namespace: str, name: str, version: str, finalizers: list[str]) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("PATCH run")
        with self._lock:
            body = self._found(self.runs, namespace, name, version)
            return self.put("run", {**body, "metadata": {**body["metadata"], "finalizers": finalizers}})

    def cluster(self, namespace: str, name: str) -> dict[str, Any] | None:
        """As the real one."""
        self.calls.append("GET cluster")
        with self._lock:
            return copy.deepcopy(self.clusters.get((namespace, name)))

    def create_cluster(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """As the real one."""
        self.calls.append("POST cluster")
        with self._lock:
            metadata = manifest["metadata"]
            if (metadata["namespace"], metadata["name"]) in self.clusters:
                raise ConflictError("a RayCluster of that name is there")
            own = {"uid": f"cluster-{next(self._versions)}", "creationTimestamp": stamp(self._clock())}
            return self.put("cluster", {**manifest, "metadata": {**metadata, **own}}, "ADDED")

    def patch_cluster(self, cluster: ClusterView, patch: list[dict[str, Any]]) -> dict[str, Any]:
        """As the real one, for the patches that the operator makes."""
        self.calls.append("PATCH cluster")
        with self._lock:
            body = self._found(self.clusters, cluster.namespace, cluster.name)
            held = {"/metadata/uid": "uid", "/metadata/resourceVersion": "resourceVersion"}
            *tests, change = patch
            for test in tests:
                if body["metadata"][held[test["path"]]] != test["value"]:
                    raise ConflictError("a test of the patch does not hold")
            return self.put("cluster", {**body, "spec": {**body["spec"], "suspend": change["value"]}})

    def delete_cluster(self, cluster: ClusterView) -> None:
        """As the real one."""
        self.calls.append("DELETE cluster")
        with self._lock:
            body = self.clusters.get((cluster.namespace, cluster.name))
            if body is not None and body["metadata"]["uid"] == cluster.uid:
                self.put("cluster", {**body, "metadata": {**body["metadata"], "deletionTimestamp": "now"}})

    def pods(self, cluster: ClusterView) -> list[dict[str, Any]]:
        """As the real one."""
        self.calls.append("GET pods")
        return self.pod_list

    def secret(self, namespace: str, name: str, key: str) -> str:
        """As the real one."""
        self.calls.append("GET secret")
        if (namespace, name, key) not in self.secrets:
            raise MissingError(f"Secret {name!r} in {namespace} has no {key!r}")
        return self.secrets[namespace, name, key]

    def post_event(self, event: Mapping[str, Any]) -> None:
        """As the real one."""
        self.calls.append("POST event")
        self.events.append(dict(event))

    def _found(
        self, table: Mapping[Name, dict[str, Any]], namespace: str, name: str, version: str = ""
    ) -> dict[str, Any]:
        with self._lock:
            body = table.get((namespace, name))
            if body is None:
                raise MissingError(f"there is no {name!r} in {namespace}")
            if version and body["metadata"]["resourceVersion"] != version:
                raise ConflictError("it was written in between")
            return copy.deepcopy(body)


def _merged(old: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with a JSON merge patch."""
    made = dict(old)
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = _merged(made.get(name) or {}, value) if isinstance(value, dict) else value
    return made


READY = {
    "state": "ready",
    "conditions": [{"type": "HeadPodReady", "status": "True"}, {"type": "RayClusterProvisioned", "status": "True"}],
}
"""Status of a RayCluster whose pods are all ready."""
SUSPENDED = {
    "state": "suspended",
    "conditions": [{"type": "HeadPodReady", "status": "False"}, {"type": "RayClusterSuspended", "status": "True"}],
}
"""Status of a RayCluster that has given its nodes back."""
