"""The cluster's chart on a real Kubernetes: installed, tried by its own smoke test, hurt, and taken away."""

import base64
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.api import ApiError, Manifest
from tests.cluster.conftest import ROOT
from tests.cluster.kubernetes import Kubernetes, running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

CHART = ROOT / "charts" / "steadyhelm-cluster"
NAMESPACE, RELEASE = "chart", "rl"
HEAD = f"/api/v1/namespaces/{NAMESPACE}/services/{RELEASE}-head-svc:8265/proxy"


@pytest.fixture(scope="module")
def release(kubernetes: Kubernetes, kuberay: str, images: dict[str, Any]) -> Iterator[str]:
    """The chart's smallest example in a namespace that takes *restricted* pods alone; tells who is KubeRay."""
    place = "/api/v1/namespaces"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubernetes.api.create(place, {"metadata": {"name": NAMESPACE, "labels": labels}})
    values = kubernetes.folder / "values.yaml"
    values.write_text(yaml.safe_dump(images))
    files = ["--values", CHART / "examples" / "small-cpu.yaml", "--values", values]
    kubernetes.run("helm", "install", RELEASE, CHART, "--namespace", NAMESPACE, *files)
    yield kuberay
    kubernetes.api.delete(f"{place}/{NAMESPACE}")
    kubernetes.until(lambda: kubernetes.api.get(f"{place}/{NAMESPACE}") is None, "the namespace is gone", seconds=120)


def pods(kubernetes: Kubernetes, group: str) -> list[Manifest]:
    return kubernetes.pods(NAMESPACE, **{"ray.io/group": group})


def one_running(kubernetes: Kubernetes, group: str, *, apart: str = "", seconds: float = 180) -> Manifest:
    """The group's pod, once it is ready; ``apart`` names one that does not count."""

    def found() -> Manifest | None:
        return next((p for p in pods(kubernetes, group) if running(p) and p["metadata"]["name"] != apart), None)

    return kubernetes.until(found, f"a pod of {group} is ready", seconds=seconds, namespace=NAMESPACE)


def steadyhelm(kubernetes: Kubernetes, *words: str | Path, seconds: float = 90) -> str:
    """What a command of ours prints that is sent to the release."""
    command = (sys.executable, "-m", "steadyhelm.cli", *words, "--release", RELEASE, "--namespace", NAMESPACE)
    return kubernetes.run(*command, timeout_s=seconds)


def reached(kubernetes: Kubernetes, *, iteration: int, phase: str = "") -> dict[str, Any]:
    """The run's status, once it has that iteration behind it."""

    def found() -> dict[str, Any] | None:
        try:
            said = json.loads(steadyhelm(kubernetes, "status", "story-transformers", "--json"))
        except AssertionError:  # the head is not there yet, or no longer
            return None
        document: dict[str, Any] | None = said["status"]
        if document is None:
            assert said["job"]["status"] in ("PENDING", "RUNNING"), said
            return None
        assert document["phase"] in ("starting", "running"), document
        return document if document["iteration"] >= iteration and phase in ("", document["phase"]) else None

    return kubernetes.until(found, f"iteration {iteration} is behind", seconds=240, namespace=NAMESPACE)


def test_every_pool_has_its_pods_and_kuberay_calls_the_cluster_ready(kubernetes: Kubernetes, release: str):
    for group in ("headgroup", "rollout", "reward", "learner"):
        one_running(kubernetes, group)
    assert pods(kubernetes, "reference") == []
    path = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters/{RELEASE}"

    def state() -> bool:
        return ((kubernetes.api.get(path) or {}).get("status") or {}).get("state") == "ready"

    kubernetes.until(state, "the RayCluster is ready", seconds=60, namespace=NAMESPACE)


def test_every_process_is_nobody_in_particular_on_a_file_system_that_it_cannot_write_to(
    kubernetes: Kubernetes, release: str
):
    head = one_running(kubernetes, "headgroup")["metadata"]["name"]
    inside = ("kubectl", "-n", NAMESPACE, "exec", head, "-c", "ray-head", "--")
    assert kubernetes.run(*inside, "id", "-u").strip() == "10001"
    tried = kubernetes.run(*inside, "bash", "-c", "touch /opt/steadyhelm/x 2>&1 || true; command -v gcc cc c++ || true")
    assert "Read-only file system" in tried
    assert len(tried.splitlines()) == 1, "there is a compiler"


def test_the_ray_api_answers_only_who_has_the_token(kubernetes: Kubernetes, release: str):
    one_running(kubernetes, "headgroup")
    with pytest.raises(ApiError) as refused:
        kubernetes.api.call("GET", f"{HEAD}/api/jobs/")
    assert refused.value.code == 401
    secret = kubernetes.api.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/{RELEASE}")
    assert secret is not None
    token = base64.b64decode(secret["data"]["auth_token"]).decode()
    answer = kubernetes.api.call("GET", f"{HEAD}/api/jobs/", **{"X-Ray-Authorization": f"Bearer {token}"})
    assert isinstance(json.loads(answer), list)


def test_helms_own_test_trains_an_iteration(kubernetes: Kubernetes, release: str):
    one_running(kubernetes, "learner")
    try:
        said = kubernetes.run("helm", "test", RELEASE, "--namespace", NAMESPACE, "--timeout", "10m", timeout_s=660)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{kubernetes.told(NAMESPACE)}") from None
    assert "Succeeded" in said


def test_a_submitted_run_outlives_its_rollout_pod_and_its_head(kubernetes: Kubernetes, release: str, tmp_path: Path):
    shutil.copy(CHART / "files" / "smoke" / "smoke.py", tmp_path)
    store = f"s3://steadyhelm/runs?endpoint=http://{RELEASE}-s3.{NAMESPACE}.svc:7070"
    run = yaml.safe_load((CHART / "files" / "smoke" / "smoke.yaml").read_text())
    run |= {"name": "story", "store": {"uri": store}}
    run["schedule"] |= {"iterations": 60, "checkpoint_every": 2}
    file = tmp_path / "story.yaml"
    file.write_text(yaml.safe_dump(run))
    worker, head = (one_running(kubernetes, group)["metadata"]["name"] for group in ("rollout", "headgroup"))

    steadyhelm(kubernetes, "submit", file, "--detach")
    reached(kubernetes, iteration=2, phase="running")

    kubernetes.api.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/{worker}", grace_s=0)
    so_far = reached(kubernetes, iteration=1)["iteration"]
    one_running(kubernetes, "rollout", apart=worker)
    assert reached(kubernetes, iteration=so_far + 2)["attempt"] == 1, "the run went on by itself"

    kubernetes.api.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/{head}", grace_s=0)
    one_running(kubernetes, "headgroup", apart=head)
    for group in ("learner", "reward", "rollout"):
        one_running(kubernetes, group)
    # Nobody resubmits without the operator; a user does, by the same command.
    steadyhelm(kubernetes, "submit", file, "--detach", "--take-over")
    again = reached(kubernetes, iteration=so_far + 3, phase="running")
    assert again["attempt"] == 2
    steadyhelm(kubernetes, "stop", "story-transformers", seconds=200)


def test_after_uninstalling_nothing_is_left(kubernetes: Kubernetes, release: str):
    kubernetes.run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", timeout_s=300)
    kubernetes.until(lambda: not kubernetes.left(NAMESPACE), "the namespace is empty", seconds=180, namespace=NAMESPACE)
