"""The stand-in for KubeRay makes what KubeRay makes: held to objects that the real operator made from a RayCluster."""

import os
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.stand_in.objects import autoscaler_rights, check_name, head_pod, head_service, secret, worker_pod

Manifest = dict[str, Any]

DEFAULTS: dict[str, Any] = {
    "dnsPolicy": "ClusterFirst",
    "enableServiceLinks": True,
    "preemptionPolicy": "PreemptLowerPriority",
    "priority": 0,
    "schedulerName": "default-scheduler",
    "securityContext": {},
    "serviceAccount": ...,
    "tolerations": ...,
    "nodeName": ...,
    "terminationMessagePath": "/dev/termination-log",
    "terminationMessagePolicy": "File",
    "terminationGracePeriodSeconds": 30,
    "serviceAccountName": "default",
    "scheme": "HTTP",
    "successThreshold": 1,
    "clusterIPs": ...,
    "internalTrafficPolicy": "Cluster",
    "ipFamilies": ...,
    "ipFamilyPolicy": "SingleStack",
    "sessionAffinity": "None",
    "protocol": "TCP",
    "creationTimestamp": ...,
    "generation": ...,
    "resourceVersion": ...,
    "uid": ...,
    "annotations": ...,
}
"""What the API server adds (``...``: of whatever value), which the goldens have as they were read back from it."""


@pytest.fixture(scope="module")
def golden():
    """Reads the objects of a file."""
    if "STEADYHELM_KUBERAY_CRDS" not in os.environ:
        pytest.skip("STEADYHELM_KUBERAY_CRDS names no folder with objects of the real KubeRay operator")
    folder = Path(os.environ["STEADYHELM_KUBERAY_CRDS"]) / "golden"

    def read(name: str) -> list[Manifest]:
        return yaml.safe_load((folder / f"{name}.yaml").read_text())["items"]

    return read


@pytest.fixture(scope="module")
def cluster(golden) -> Manifest:
    (found,) = golden("raycluster")
    return found


def bare(part: Any) -> Any:
    """Without what the API server adds, and without the account's token, which it mounts."""
    if isinstance(part, list):
        return [bare(each) for each in part if not (isinstance(each, dict) and "kube-api" in str(each.get("name")))]
    if isinstance(part, dict):
        whose = {"serviceAccountName"} if part.get("serviceAccountName") not in (None, "default") else set()
        return {
            key: bare(value)
            for key, value in part.items()
            if key in whose or key not in DEFAULTS or DEFAULTS[key] not in (..., value)
        }
    return part


def comparable(pod: Manifest) -> Manifest:
    """A pod as what it does: commands as words, variables and mounts by name."""
    spec = deepcopy(bare(pod["spec"]))
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        if container["name"] == "wait-gcs-ready":
            assert "ray health-check --address" in container.pop("args")[0]
        else:
            container["args"] = sorted(shlex.split(container["args"][0]))
        variables = {variable.pop("name"): bare(variable) for variable in container["env"]}
        if "KUBERAY_GEN_RAY_START_CMD" in variables:
            variables["KUBERAY_GEN_RAY_START_CMD"] = sorted(
                shlex.split(variables["KUBERAY_GEN_RAY_START_CMD"]["value"])
            )
        # It tells Ray's makers of itself.
        variables.pop("RAY_USAGE_STATS_EXTRA_TAGS", None)
        container["env"] = variables
        mounts = container.pop("volumeMounts", [])
        container["volumeMounts"] = {mount["mountPath"]: mount["name"] for mount in mounts}
    for unordered in ("containers", "volumes"):
        spec[unordered].sort(key=lambda part: part["name"])
    labels, name = pod["metadata"]["labels"], pod["metadata"]["generateName"]
    return {"name": name, "labels": labels, "owners": pod["metadata"]["ownerReferences"], "spec": spec}


def test_the_head_pod_is_the_one_that_kuberay_makes(golden, cluster):
    real = next(pod for pod in golden("pods") if pod["metadata"]["labels"]["ray.io/node-type"] == "head")
    assert comparable(head_pod(cluster)) == comparable(real)


def test_a_worker_pod_is_the_one_that_kuberay_makes(golden, cluster):
    real = next(pod for pod in golden("pods") if pod["metadata"]["labels"]["ray.io/node-type"] == "worker")
    assert comparable(worker_pod(cluster, cluster["spec"]["workerGroupSpecs"][0], 0)) == comparable(real)


def test_the_heads_service_is_the_one_that_kuberay_makes(golden, cluster):
    (real,) = golden("services")
    assert bare(head_service(cluster)["spec"]) == bare(real["spec"])
    assert head_service(cluster)["metadata"]["labels"] == real["metadata"]["labels"]


def test_the_autoscaler_has_the_rights_that_kuberay_gives_it(golden, cluster):
    account, role, binding = autoscaler_rights(cluster)
    (real_role,), (real_binding,) = golden("roles"), golden("rolebindings")
    real_account = golden("serviceaccounts")[1]
    assert role["rules"] == real_role["rules"]
    assert (binding["roleRef"], binding["subjects"]) == (real_binding["roleRef"], real_binding["subjects"])
    for made, real in ((account, real_account), (role, real_role), (binding, real_binding)):
        assert made["metadata"]["name"] == real["metadata"]["name"]
        assert made["metadata"]["labels"] == real["metadata"]["labels"]
        assert made["metadata"]["ownerReferences"] == real["metadata"]["ownerReferences"]


def test_a_token_is_made_only_where_the_api_asks_for_one(cluster):
    token = secret(cluster)
    assert token is not None
    assert list(token["stringData"]) == ["auth_token"]
    open_to_all = deepcopy(cluster)
    open_to_all["spec"]["authOptions"] = {}
    assert secret(open_to_all) is None
    brought = deepcopy(cluster)
    brought["spec"]["authOptions"]["secretName"] = "mine"
    assert secret(brought) is None
    variables = {v["name"]: v for v in head_pod(brought)["spec"]["containers"][0]["env"]}
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "mine"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("rl", "rl"),
        ("a" * 50, "a" * 50),
        ("ab" + "c" * 50, "c" * 50),
        ("a7" + "c" * 49, "r" + "c" * 49),
        ("a-" + "c" * 49, "r" + "c" * 49),
    ],
)
def test_a_name_is_cut_as_kuberay_cuts_it(name: str, kept: str):
    assert check_name(name) == kept


def test_what_belongs_to_a_cluster_with_a_long_name_has_names_that_are_cut():
    metadata = {"name": "a" + "b" * 50, "namespace": "ns", "uid": "1"}
    container = {"name": "ray-head", "image": "i", "ports": [{"name": "gcs-server", "containerPort": 6379}]}
    template = {"spec": {"serviceAccountName": "a" + "b" * 45 + "-head", "containers": [container]}}
    spec = {
        "enableInTreeAutoscaling": True,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"template": template},
    }
    cluster = {"metadata": metadata, "spec": spec}
    account = "b" * 45 + "-head"
    role, binding = autoscaler_rights(cluster)
    head, token = head_pod(cluster), secret(cluster)
    assert token is not None
    assert [found["metadata"]["name"] for found in (role, binding, token)] == ["b" * 50] * 3
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == ("b" * 50, account)
    assert head["spec"]["serviceAccountName"] == account
    variables = {variable["name"]: variable for variable in head["spec"]["containers"][0]["env"]}
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "b" * 50
