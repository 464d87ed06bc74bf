"""What is read from Kubernetes' objects, and what is made for it."""

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm_operator import resources
from steadyhelm_operator.state import ClusterView, Notice, Problem

from tests.charts.schemas import kubernetes
from tests.operator.objects import run_file, training_run


def cluster(status: dict[str, Any] | None = None, **spec: Any) -> ClusterView:
    body = {
        "metadata": {"name": "rl", "namespace": "ns", "uid": "u", "resourceVersion": "7"},
        "spec": spec,
        "status": status or {},
    }
    return resources.cluster_view(body)


def conditions(**found: str) -> dict[str, Any]:
    return {"conditions": [{"type": name, "status": status} for name, status in found.items()]}


@pytest.mark.parametrize(
    ("status", "provisioned", "head_ready", "suspended"),
    [
        ({}, False, False, False),
        (conditions(HeadPodReady="True", RayClusterProvisioned="False"), False, True, False),
        (conditions(HeadPodReady="True", RayClusterProvisioned="True"), True, True, False),
        (conditions(HeadPodReady="False", RayClusterProvisioned="True"), True, False, False),
        (conditions(HeadPodReady="False", RayClusterSuspended="True"), False, False, True),
        ({"state": "ready"}, True, True, False),
        ({"state": "ready", **conditions(HeadPodReady="False")}, True, False, False),
        ({"state": "suspended"}, False, False, True),
    ],
)
def test_a_clusters_state_is_in_its_conditions(
    status: dict[str, Any], provisioned: bool, head_ready: bool, suspended: bool
):
    found = cluster(status)
    assert (found.provisioned, found.head_ready, found.suspended) == (provisioned, head_ready, suspended)


def test_the_head_is_reached_by_its_service_and_its_token_is_in_a_secret():
    assert cluster(authOptions={"mode": "token"}).host == "rl-head-svc.ns.svc"
    assert cluster({"head": {"serviceName": "other-svc"}}).host == "other-svc.ns.svc"
    assert cluster(authOptions={"mode": "token"}).secret == "rl"
    assert cluster(authOptions={"mode": "token", "secretName": "mine"}).secret == "mine"
    assert cluster(authOptions={"mode": "disabled"}).secret == ""


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("a" * 50, "a" * 50),
        ("xyz" + "a" * 50, "a" * 50),
        ("x" + "-" + "a" * 49, "r" + "a" * 49),
        ("x1" + "a" * 49, "r" + "a" * 49),
    ],
)
def test_the_secret_of_a_cluster_with_a_long_name_has_the_end_of_it(name: str, secret: str):
    body = {"metadata": {"name": name, "namespace": "ns", "uid": "u"}, "spec": {"authOptions": {"mode": "token"}}}
    assert resources.cluster_view(body).secret == secret


def test_kuberays_own_object_is_a_cluster_that_is_ready():
    folder = os.environ.get("STEADYHELM_KUBERAY_CRDS")
    if folder is None or not (Path(folder) / "golden" / "raycluster.yaml").is_file():
        pytest.skip("STEADYHELM_KUBERAY_CRDS names no folder with objects of the real KubeRay operator")
    found = yaml.safe_load((Path(folder) / "golden" / "raycluster.yaml").read_text())
    body = found["items"][0] if "items" in found else found
    view = resources.cluster_view(body)
    assert view.head_ready
    assert view.secret != ""
    assert view.host.endswith(f"-head-svc.{view.namespace}.svc")


def pod(pool: str, **status: Any) -> dict[str, Any]:
    return {"metadata": {"labels": {"app.kubernetes.io/component": pool}}, "status": status}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": [{"name": "ray-worker", "image": "a/b:1", "ready": False, "state": state}]}


PODS = {
    "NoCapacity": (
        [pod("learner", conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}])] * 2
        + [pod("learner", phase="Running")] * 2,
        "2 of 4 learner pods: 0/3 nodes",
    ),
    "ImagePull": ([pod("rollout", **waiting("ImagePullBackOff"))], "1 of 1 rollout pods: image a/b:1 cannot be pulled"),
    "PodConfig": (
        [pod("head", **waiting("CreateContainerConfigError", 'secret "s3" not found'))],
        '1 of 1 head pods: secret "s3" not found',
    ),
    "PodCrash": ([pod("reward", **waiting("CrashLoopBackOff", "back-off"))], "1 of 1 reward pods: back-off"),
    "OutOfMemory": (
        [
            pod("learner", containerStatuses=[
                {"name": "ray-worker", "ready": False, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                 "lastState": {"terminated": {"reason": "OOMKilled"}}}
            ])
        ],
        "1 of 1 learner pods: ray-worker was killed for want of memory",
    ),
    "DiskFull": (
        [pod("head", reason="Evicted", message="Usage of EmptyDir volume exceeds (ephemeral-storage)")],
        "1 of 1 head pods: Usage of EmptyDir",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", PODS)
def test_what_keeps_pods_from_running_is_named_with_its_remedy(reason: str):
    pods, message = PODS[reason]
    (found,) = resources.problems(pods)
    assert found.reason == reason
    assert found.message.startswith(message)
    assert found.message.endswith(")")


def test_pods_that_run_have_no_problem():
    ready = {"containerStatuses": [{"name": "a", "ready": True, "state": {"running": {}}}]}
    assert resources.problems([pod("head", **ready), pod("reward", phase="Pending")]) == ()


def test_the_most_frequent_problem_comes_first():
    full = pod("learner", conditions=[{"type": "PodScheduled", "status": "False", "message": "full"}])
    found = resources.problems([pod("head", **waiting("ErrImagePull")), full, full])
    assert [problem.reason for problem in found] == ["NoCapacity", "ImagePull"]
    assert isinstance(found[0], Problem)


def test_files_have_names_of_their_own_beside_the_run_file():
    wrong = (
        "run.yaml",
        "/etc/passwd",
        "../a.py",
        "a//b.py",
        "",
        "./a.py",
        "a\\b.py",
        "a\0.py",
        "a\nb.py",
        "a:b",
        "x" * 256,
    )
    for name in wrong:
        body = training_run(files={name: ""})
        assert "is no name of a file beside run.yaml" in resources.desired(body).problem
    right = {"task.py": "x", "lib/a.py": "y", "ü b-1.py": "", "a (1), [x]#%20.csv": ""}
    assert resources.desired(training_run(files=right)).problem == ""


@pytest.mark.parametrize(("length", "own", "right"), [(45, True, True), (46, True, False), (53, False, True)])
def test_a_cluster_of_its_own_has_a_name_that_kuberay_keeps_whole(length: int, own: bool, right: bool):
    cluster = {"template": {"spec": {"headGroupSpec": {}}}} if own else {"name": "rl"}
    problem = resources.desired(training_run(name="r" * length, cluster=cluster)).problem
    assert (problem == "") == right
    assert right or "no more than 45 characters" in problem


@pytest.mark.parametrize(("file", "below"), [("a", "a/b.py"), ("a/b", "a/b/c/d.py"), ("run.yaml", "run.yaml/a.py")])
def test_no_file_is_a_folder_too(file: str, below: str):
    found = resources.desired(
        training_run(files={"task.py": "", below: "", **({} if file == "run.yaml" else {file: ""})})
    )
    assert f"{file!r} is a file, and {below!r} makes it a folder" in found.problem


def test_code_is_beside_the_run_file_or_in_the_image():
    lacks = resources.desired(training_run(run_file(model={"factory": "nowhere.py:model"})))
    assert lacks.problem == (
        "spec.run.model.factory is 'nowhere.py:model': put 'nowhere.py' into spec.files, or name a file of the image "
        "by its whole path"
    )
    for right in ("/opt/code/there.py:model", "./task.py:model"):
        assert resources.desired(training_run(run_file(model={"factory": right}))).problem == ""


@pytest.mark.parametrize("uri", ["runs", "./runs", "../runs", "~/runs"])
def test_a_store_that_would_go_away_with_the_job_is_refused(uri: str):
    found = resources.desired(training_run(run_file(store={"uri": uri})))
    assert found.spec is None
    assert f"store.uri is {uri!r}, a folder that would go away with the job" in found.problem


@pytest.mark.parametrize("uri", ["s3://bucket/runs", "/shared/runs", "file:///shared/runs"])
def test_a_store_that_all_nodes_reach_is_taken(uri: str):
    assert resources.desired(training_run(run_file(store={"uri": uri}))).problem == ""


def test_a_run_without_a_store_gets_the_cluster_s_or_does_not_begin(tmp_path: Path):
    (tmp_path / "steadyhelm").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "steadyhelm").chmod(0o755)
    body = training_run()
    line = resources.submission(resources.desired(body), 1, body["spec"], take_over=False, changed=False).entrypoint
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    given = [path, path | {"STEADYHELM_STORE_URI": ""}, path | {"STEADYHELM_STORE_URI": "s3://b/r?a=1&b=2"}]
    done = [subprocess.run(["/bin/sh", "-c", line], env=env, capture_output=True, text=True) for env in given]
    assert [found.returncode for found in done] == [2, 2, 0]
    assert done[0].stdout == done[1].stdout == ""
    assert done[0].stderr == "the run has no store: set spec.run.store.uri, or s3.uri of the cluster's chart\n"
    assert done[2].stdout.endswith("--set store.uri=s3://b/r?a=1&b=2\n")


def test_a_run_has_an_id_that_its_store_can_hold():
    named = resources.desired(training_run(name="images"))
    assert "a run cannot be called 'images'" in named.problem
    assert "a run cannot be called 'images'" in resources.desired(training_run(id="images")).problem
    assert resources.desired(training_run(name="images", id="pictures")).problem == ""


def test_what_is_shipped_has_a_bound():
    found = resources.desired(training_run(files={"task.py": "x" * 1_000_000}))
    assert "at most 900000 can be shipped: use an image" in found.problem


def test_the_checksum_of_a_run_is_that_of_what_is_shipped():
    first = resources.desired(training_run()).payload
    assert first == resources.desired(training_run(suspend=True, cleanup={"afterSeconds": 1})).payload
    assert first != resources.desired(training_run(run_file(seed=1))).payload
    assert first != resources.desired(training_run(files={"task.py": ""})).payload


def test_a_run_file_is_shipped_as_it_was_written():
    spec = training_run(run_file(learner={"lr": 1.0e-7}))["spec"]
    assert json.loads(resources.shipped(spec)["run.yaml"]) == spec["run"]


def test_jobs_of_a_run_that_was_made_anew_have_other_ids():
    first, second = training_run(), training_run()
    second["metadata"]["uid"] = "another-uid"
    ids = [resources.submission_id(resources.desired(body), 1) for body in (first, second)]
    assert ids[0] != ids[1]


def test_an_event_is_one_that_kubernetes_takes():
    run = resources.desired(training_run())
    notice = Notice(warning=True, reason="NoCapacity", message="m" * 2000)
    found = resources.event(run, notice, datetime(2026, 1, 1, tzinfo=UTC))
    schema = kubernetes("Event", "events-v1")
    assert schema is not None
    assert [error.message for error in schema.iter_errors(found)] == []
    assert len(found["note"]) <= 1024


values = st.recursive(
    st.integers() | st.text("xyz", max_size=3) | st.booleans() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


def patched(old: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7386."""
    made = dict(old)
    for name, value in patch.items():
        if value is None:
            made.pop(name, None)
        elif isinstance(value, dict):
            made[name] = patched(made[name] if isinstance(made.get(name), dict) else {}, value)
        else:
            made[name] = value
    return made


@given(documents, documents)
def test_a_merge_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]):
    patch = resources.merge_patch(old, new)
    assert patched(old, patch) == new
    assert resources.merge_patch(new, new) == {}
