"""An S3 server beside the release's: a pod that refuses the release's key, or has no room left."""

from tests.cluster.api import Manifest
from tests.cluster.kubernetes import Kubernetes, running
from tests.cluster.release import NAMESPACE, RELEASE, S3_PORT

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


def strange_store(kubernetes: Kubernetes, name: str, *, full: bool = False, stranger: bool = False) -> str:
    """Its URI. ``full``: its disk is; ``stranger``: it has another key than the release's."""
    (like,) = kubernetes.pods(NAMESPACE, **{"app.kubernetes.io/component": "s3"})
    spec = like["spec"]
    (bucket,), (server,) = spec["initContainers"], spec["containers"]
    fill = "head -c 100M /dev/zero >/data/fill 2>/dev/null || true" if full else ""
    key = f"{RELEASE}-s3"
    variables = [_key("ROOT_ACCESS_KEY", key, "access-key"), _key("ROOT_SECRET_KEY", key, "secret-key")]
    if stranger:
        variables = [
            {"name": "ROOT_ACCESS_KEY", "value": "stranger"},
            {"name": "ROOT_SECRET_KEY", "value": "of-no-use"},
        ]
    pod: Manifest = {
        "metadata": {"name": name},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": spec["securityContext"],
            "terminationGracePeriodSeconds": 1,
            "initContainers": [_part(bucket, command=["bash", "-c", f"mkdir -p /data/steadyhelm; {fill}"])],
            "containers": [_part(server, args=server["args"], env=variables)],
            "volumes": [
                {"name": "data", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "scratch", "emptyDir": {}},
            ],
        },
    }
    kubernetes.api.create(PODS, pod)

    def address() -> str:
        found = kubernetes.api.get(f"{PODS}/{name}")
        return str(found["status"]["podIP"]) if found and running(found) else ""

    where = kubernetes.until(address, f"{name} serves", seconds=60, namespace=NAMESPACE)
    return f"s3://steadyhelm/runs?endpoint=http://{where}:{S3_PORT}"


def _key(variable: str, secret: str, key: str) -> Manifest:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _part(container: Manifest, **changes: object) -> Manifest:
    """A container like that one."""
    kept = {
        field: container[field]
        for field in ("name", "image", "imagePullPolicy", "ports", "readinessProbe", "securityContext", "volumeMounts")
        if field in container
    }
    return kept | {
        "resources": {"limits": {"memory": "128Mi"}, "requests": {"cpu": "10m", "memory": "32Mi"}},
        **changes,
    }
