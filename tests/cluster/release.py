"""A release of the cluster's chart on a real Kubernetes, and what is asked of it again and again."""

import base64
import contextlib
import sys
from pathlib import Path

import yaml

from tests.cluster.api import ApiError, Manifest
from tests.cluster.kubernetes import Kubernetes, running

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "steadyhelm-cluster"
OPERATOR_CHART = ROOT / "charts" / "steadyhelm-operator"
NAMESPACE, RELEASE = "rl-tests", "rl"
OPERATOR_NAMESPACE = "operator-tests"
HEAD = f"/api/v1/namespaces/{NAMESPACE}/services/{RELEASE}-head-svc:8265/proxy"
DRIVER = f"/api/v1/namespaces/{NAMESPACE}/services/{RELEASE}-head-svc:8266/proxy"
S3_PORT = 7070
STORE = f"s3://steadyhelm/runs?endpoint=http://{RELEASE}-s3.{NAMESPACE}.svc:{S3_PORT}"


def smoke_run(name: str, iterations: int) -> Manifest:
    """The smoke test's run file, for longer."""
    run: Manifest = yaml.safe_load((CHART / "files" / "smoke" / "smoke.yaml").read_text())
    run |= {"name": name, "store": {"uri": STORE}}
    run["schedule"] |= {"iterations": iterations, "checkpoint_every": 2}
    return run


def token(kubernetes: Kubernetes) -> str:
    """Of the release's Ray API."""
    secret = kubernetes.api.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/{RELEASE}")
    assert secret is not None
    return base64.b64decode(secret["data"]["auth_token"]).decode()


def api_answers(kubernetes: Kubernetes) -> bool:
    """Whether the Ray API says anything: it begins to some seconds after the head's pod is ready."""
    try:
        kubernetes.api.call("GET", f"{HEAD}/api/jobs/")
    except ApiError as error:
        return error.code in (401, 403)
    return True


def pods(kubernetes: Kubernetes, group: str) -> list[Manifest]:
    return kubernetes.pods(NAMESPACE, **{"ray.io/group": group})


def one_running(kubernetes: Kubernetes, group: str, *, apart: str = "", seconds: float = 180) -> Manifest:
    """The group's pod, once it is ready; ``apart`` names one that does not count."""

    def found() -> Manifest | None:
        return next((p for p in pods(kubernetes, group) if running(p) and p["metadata"]["name"] != apart), None)

    return kubernetes.until(found, f"a pod of {group} is ready", seconds=seconds, namespace=NAMESPACE)


def kill(kubernetes: Kubernetes, pod: Manifest) -> None:
    """Has every process in a pod's first container killed (SIGKILL), and then the pod deleted without any grace.

    Deleting alone would not do: even without a grace Kubernetes sends SIGTERM first, and Ray drains its node by it.
    """
    name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]["name"]
    with contextlib.suppress(AssertionError):  # the command's own end depends on who is faster
        inside = ("exec", name, "-c", container, "--", "bash", "-c", "kill -9 -1")
        kubernetes.run("kubectl", "-n", pod["metadata"]["namespace"], *inside)
    kubernetes.api.delete(f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{name}", grace_s=0)


def replaced(kubernetes: Kubernetes, group: str, *, seconds: float = 180) -> Manifest:
    """Kills the group's pod, and returns the one that is ready in its place."""
    victim = one_running(kubernetes, group)
    kill(kubernetes, victim)
    return one_running(kubernetes, group, apart=victim["metadata"]["name"], seconds=seconds)


def steadyhelm(kubernetes: Kubernetes, *words: str | Path, seconds: float = 90) -> str:
    """What a command of ours prints that is sent to the release."""
    command = (sys.executable, "-m", "steadyhelm.cli", *words, "--release", RELEASE, "--namespace", NAMESPACE)
    return kubernetes.run(*command, timeout_s=seconds)
