"""What stands in for KubeRay where there are a thousand RayClusters: it watches, and reads no list again."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3

from steadyhelm_operator.testing.memory import READY
from steadyhelm_operator.testing.nodes import TOLERATION
from steadyhelm_operator.testing.server import MERGE, Api

Manifest = dict[str, Any]
HEAD, WORKER = "head", "worker"
WORKERS = 2
"""Of each cluster, whatever it asks for."""
_HEAD_READY = {"conditions": [{"type": "HeadPodReady", "status": "True"}]}


class KubeRayStandIn:
    """Makes a head and two workers for each RayCluster in a namespace, and says of it what they are.

    Args:
        admin: who asks the API server.
        namespace: whose RayClusters are looked after.

    Attributes:
        faults: what the API server refused.
    """

    def __init__(self, admin: Api, namespace: str = "default") -> None:
        self._admin = admin
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._clusters = f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters"
        self._hands = ThreadPoolExecutor(max_workers=8, thread_name_prefix="kuberay")
        self._made: set[str] = set()
        self._ready: dict[str, set[str]] = defaultdict(set)
        self._told: dict[str, int] = {}
        self._over = threading.Event()
        self._answers: dict[str, urllib3.BaseHTTPResponse] = {}
        self.faults: list[str] = []

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Works while the context lasts."""
        watches = [("clusters", self._clusters, self._cluster), ("pods", self._pods, self._pod)]
        threads = [threading.Thread(target=self._follow, args=watch, daemon=True) for watch in watches]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for answer in self._answers.values():
                answer.shutdown()
            for thread in threads:
                thread.join(timeout=10)
            self._hands.shutdown(cancel_futures=True)

    def _follow(self, kind: str, path: str, handle: Callable[[str, Manifest], None]) -> None:
        """Watches, anew where a watch ends or breaks: each begins with all that there is."""
        while not self._over.is_set():
            with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
                self._answers[kind] = self._admin.watch(path)
                for line in self._answers[kind]:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        self.faults.append(str(event["object"].get("message")))
                        break
                    if event["type"] != "DELETED":
                        handle(event["object"]["metadata"]["name"], event["object"])
            self._over.wait(0.2)

    def _cluster(self, name: str, body: Manifest) -> None:
        if name in self._made or "deletionTimestamp" in body["metadata"]:
            return
        self._made.add(name)
        for number in range(WORKERS + 1):
            self._do("POST", self._pods, _pod(body, HEAD if not number else WORKER, number), "application/json")

    def _pod(self, name: str, body: Manifest) -> None:
        conditions = (body.get("status") or {}).get("conditions") or ()
        if not any(found["type"] == "Ready" and found["status"] == "True" for found in conditions):
            return
        cluster = name.rpartition("-")[0]
        ready = self._ready[cluster]
        ready.add(name)
        status = READY if len(ready) > WORKERS else _HEAD_READY if f"{cluster}-0" in ready else None
        if status is not None and self._told.get(cluster) != len(status):
            self._told[cluster] = len(status)
            self._do("PATCH", f"{self._clusters}/{cluster}/status", {"status": status}, MERGE)

    def _do(self, verb: str, path: str, body: Manifest, kind: str) -> None:
        def done() -> None:
            status, answer = self._admin.call(verb, path, body, kind)
            if status >= 400:
                self.faults.append(f"{verb} {path}: {answer}")

        self._hands.submit(done)


def _pod(cluster: Manifest, kind: str, number: int) -> Manifest:
    name, uid = cluster["metadata"]["name"], cluster["metadata"]["uid"]
    owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": name, "uid": uid, "controller": True}
    return {
        "metadata": {
            "name": f"{name}-{number}",
            "labels": {"ray.io/cluster": name, "ray.io/node-type": kind, "ray.io/group": kind},
            "ownerReferences": [owner],
        },
        "spec": {
            "containers": [{"name": "ray", "image": "ray", "resources": {"requests": {"cpu": "100m"}}}],
            "tolerations": [TOLERATION],
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
        },
    }
