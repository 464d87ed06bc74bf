"""At the end of the story everything is taken away."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kubernetes import Kubernetes
from tests.cluster.release import NAMESPACE, OPERATOR_NAMESPACE, RELEASE
from tests.cluster.runs import RUNS, delete

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SMOKE = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{RELEASE}-smoke"
RIGHTS = ("clusterroles,clusterrolebindings", "-l", "app.kubernetes.io/instance=operator", "-o", "name")


def processes(init: int) -> list[str]:
    """Commands of the pods' processes of the node whose first process is ``init``."""
    found = []
    for group in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            if "/kubepods" in group.read_text() and init in ancestors(int(group.parent.name)):
                found.append(group.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended meanwhile
    return found


def ancestors(process: int) -> Iterator[int]:
    """The process and those that it descends from. Raises OSError where one ends meanwhile."""
    while process:
        yield process
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_after_uninstalling_no_object_no_pod_and_no_process_is_left(kubernetes: Kubernetes, operator: None):
    assert kubernetes.run("kubectl", "get", *RIGHTS)
    assert not kubernetes.init or processes(kubernetes.init)
    kubernetes.api.merge(SMOKE, {"data": {"smoke.yaml": "{}"}})  # a smoke test that fails leaves no pod either
    with pytest.raises(AssertionError, match="Waiting for the Ray API"):
        kubernetes.run("helm", "test", RELEASE, "--namespace", NAMESPACE, "--timeout", "4m", timeout_s=270)
    for run in kubernetes.api.items(RUNS):  # by the operator, as long as there is one
        delete(kubernetes, run["metadata"]["name"])
    kubernetes.run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE)
    kubernetes.run("helm", "uninstall", "operator", "--namespace", OPERATOR_NAMESPACE, "--wait", timeout_s=120)
    for namespace in (NAMESPACE, OPERATOR_NAMESPACE):
        what = f"{namespace} is empty"
        kubernetes.until(lambda of=namespace: not kubernetes.left(of), what, seconds=180, namespace=namespace)
    assert not kubernetes.run("kubectl", "get", *RIGHTS)
    if kubernetes.init:
        kubernetes.until(lambda: not processes(kubernetes.init), "no process of a pod is left", seconds=60)
