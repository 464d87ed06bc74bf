"""At the end of the story everything is taken away."""

import os
from pathlib import Path

import pytest

from tests.cluster.kubernetes import Kubernetes
from tests.cluster.release import NAMESPACE, OPERATOR_NAMESPACE, RELEASE
from tests.cluster.runs import RUNS, delete

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

RIGHTS = ("clusterroles,clusterrolebindings", "-l", "app.kubernetes.io/instance=operator", "-o", "name")


def processes() -> list[str]:
    """Commands of the processes of all pods on this machine."""
    found = []
    for group in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            if "/kubepods" in group.read_text():
                found.append(group.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended meanwhile
    return found


def test_after_uninstalling_no_object_no_pod_and_no_process_is_left(kubernetes: Kubernetes, operator: None):
    here = not os.environ.get("KUBECONFIG")  # else the processes are on somebody else's nodes
    assert kubernetes.run("kubectl", "get", *RIGHTS)
    assert not here or processes()
    for run in kubernetes.api.items(RUNS):  # by the operator, as long as there is one
        delete(kubernetes, run["metadata"]["name"])
    kubernetes.run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE)
    kubernetes.run("helm", "uninstall", "operator", "--namespace", OPERATOR_NAMESPACE, "--wait", timeout_s=120)
    for namespace in (NAMESPACE, OPERATOR_NAMESPACE):
        what = f"{namespace} is empty"
        kubernetes.until(lambda of=namespace: not kubernetes.left(of), what, seconds=180, namespace=namespace)
    assert not kubernetes.run("kubectl", "get", *RIGHTS)
    if here:
        kubernetes.until(lambda: not processes(), "no process of a pod is left", seconds=30)
