"""At the end of the story everything is taken away."""

import os
from pathlib import Path

import pytest

from tests.cluster.kubernetes import Kubernetes
from tests.cluster.release import NAMESPACE, OPERATOR_NAMESPACE, RELEASE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

RIGHTS = "clusterroles,clusterrolebindings"


def test_after_uninstalling_nothing_is_left(kubernetes: Kubernetes, operator: None):
    assert kubernetes.run("kubectl", "get", RIGHTS, "-l", "app.kubernetes.io/instance=operator", "-o", "name")
    kubernetes.run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE)
    kubernetes.run("helm", "uninstall", "operator", "--namespace", OPERATOR_NAMESPACE, "--wait", timeout_s=120)
    for namespace in (NAMESPACE, OPERATOR_NAMESPACE):
        gone = f"{namespace} is empty"
        kubernetes.until(lambda of=namespace: not kubernetes.left(of), gone, seconds=180, namespace=namespace)
    assert not kubernetes.run("kubectl", "get", RIGHTS, "-l", "app.kubernetes.io/instance=operator", "-o", "name")


def test_no_process_of_a_pod_is_left(kubernetes: Kubernetes):
    if os.environ.get("KUBECONFIG"):
        pytest.skip("the processes of somebody else's nodes are not seen from here")

    def left() -> list[str]:
        found = []
        for group in Path("/proc").glob("[0-9]*/cgroup"):
            try:
                if "kubepods" in group.read_text():
                    found.append(group.with_name("cmdline").read_text().replace("\0", " "))
            except OSError:
                continue  # it ended meanwhile
        return found

    kubernetes.until(lambda: not left(), "no pod's process is left", seconds=30)
