"""The cluster's chart on a real Kubernetes: installed, tried by its own smoke test, and hurt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.api import ApiError
from tests.cluster.kubernetes import Kubernetes
from tests.cluster.lineage import lineage
from tests.cluster.release import (
    HEAD,
    NAMESPACE,
    RELEASE,
    api_answers,
    one_running,
    pods,
    replaced,
    steadyhelm,
    token,
)
from tests.cluster.runs import CODE, STORY, WORKLOAD, digits_records, digits_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def reached(kubernetes: Kubernetes, *, iteration: int) -> dict[str, Any]:
    """The run's status by ``steadyhelm status``, once it has that iteration behind it."""

    def found() -> dict[str, Any] | None:
        said = json.loads(steadyhelm(kubernetes, "status", STORY, "--json"))
        document: dict[str, Any] | None = said["status"]
        if document is None:
            assert said["job"]["status"] in ("PENDING", "RUNNING"), said
            return None
        assert document["phase"] in ("starting", "running"), document
        return document if document["iteration"] >= iteration and document["phase"] == "running" else None

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
    bearer = {"X-Ray-Authorization": f"Bearer {token(kubernetes)}"}
    answer = kubernetes.api.call("GET", f"{HEAD}/api/jobs/", **bearer)
    assert isinstance(json.loads(answer), list)


def test_helms_own_test_trains_an_iteration(kubernetes: Kubernetes, release: str):
    one_running(kubernetes, "learner")
    try:
        said = kubernetes.run("helm", "test", RELEASE, "--namespace", NAMESPACE, "--timeout", "10m", timeout_s=660)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{kubernetes.told(NAMESPACE)}") from None
    assert "Succeeded" in said


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """The command that submits the digits run."""
    folder = tmp_path_factory.mktemp("story")
    for code in CODE:
        shutil.copy(WORKLOAD / code, folder)
    file = folder / "story.yaml"
    file.write_text(yaml.safe_dump(digits_run(iterations=5000)))
    return "submit", file, "--id", STORY, "--detach"


def newest(kubernetes: Kubernetes) -> dict[str, Any]:
    """The story's newest job, as ``steadyhelm list`` has it."""
    (found,) = (job for job in json.loads(steadyhelm(kubernetes, "list", "--json")) if job["metadata"]["run"] == STORY)
    return dict(found)


def test_a_submitted_run_trains_and_outlives_its_rollout_pod(
    kubernetes: Kubernetes, release: str, story: tuple[str | Path, ...]
):
    kubernetes.until(lambda: api_answers(kubernetes), "the Ray API answers", seconds=120, namespace=NAMESPACE)
    steadyhelm(kubernetes, *story)
    reached(kubernetes, iteration=2)
    steadyhelm(kubernetes, *story)  # finds the job that is there
    job = newest(kubernetes)
    assert (job["submission_id"], job["status"]) == (f"{STORY}.1", "RUNNING")
    assert '"event": "IterationDone"' in steadyhelm(kubernetes, "logs", STORY, "--log-format", "json")

    replaced(kubernetes, "rollout")
    so_far = reached(kubernetes, iteration=2)
    on = reached(kubernetes, iteration=so_far["iteration"] + 2)
    assert (on["attempt"], on["losses"]) == (1, 1), "the driver has replaced the engine by itself"
    assert on["lost"].startswith("rollout 0 is lost")


def test_behind_a_lost_head_the_same_command_goes_on_with_the_run(
    kubernetes: Kubernetes, release: str, story: tuple[str | Path, ...]
):
    before = reached(kubernetes, iteration=1)
    replaced(kubernetes, "headgroup")
    kubernetes.until(lambda: api_answers(kubernetes), "the Ray API answers", seconds=120, namespace=NAMESPACE)
    steadyhelm(kubernetes, *story)
    on = reached(kubernetes, iteration=before["iteration"] + 2)
    assert on["attempt"] == 2

    steadyhelm(kubernetes, "stop", STORY, seconds=200)
    assert newest(kubernetes)["status"] == "STOPPED"
    left = lineage(kubernetes, STORY, digits_records())
    left.check()
    assert (left.attempts, left.finished) == (("start", "resume"), False)
    assert left.iterations >= on["iteration"]
