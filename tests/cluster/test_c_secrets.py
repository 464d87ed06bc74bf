"""Behind the story: secrets are where they have to be and nowhere else, and pods are as confined as the chart says."""

import base64
import json
from collections.abc import Iterator

import pytest

from tests.cluster.api import Manifest
from tests.cluster.kubernetes import Kubernetes
from tests.cluster.lineage import in_head
from tests.cluster.release import HEAD, NAMESPACE, OPERATOR_NAMESPACE, RELEASE, one_running, token

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NAMESPACES = (NAMESPACE, OPERATOR_NAMESPACE)
POLICIES = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"
KINDS = (
    "pods,events,configmaps,services,statefulsets,deployments,rayclusters,trainingruns,serviceaccounts,networkpolicies"
)
PROCESSES = "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'"


@pytest.fixture(scope="module")
def secrets(kubernetes: Kubernetes, release: str) -> dict[str, str]:
    """What nobody may read: the store's key, and the token of the Ray API."""
    one_running(kubernetes, "headgroup")
    found = kubernetes.api.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/{RELEASE}-s3")
    assert found is not None
    return {"s3": base64.b64decode(found["data"]["secret-key"]).decode(), "token": token(kubernetes)}


def containers(kubernetes: Kubernetes) -> Iterator[tuple[str, Manifest, str]]:
    """Namespace, pod and container of everything that runs."""
    for namespace in NAMESPACES:
        for pod in kubernetes.pods(namespace):
            for state in pod["status"].get("containerStatuses", []):
                if "running" in state["state"]:
                    yield namespace, pod, state["name"]


def found_in(text: str, secrets: dict[str, str]) -> list[str]:
    """Names of the secrets that the text has, as they are or in base64."""
    return [
        name
        for name, secret in secrets.items()
        if secret in text or base64.b64encode(secret.encode()).decode().rstrip("=") in text
    ]


def test_no_object_but_secrets_has_a_secret(kubernetes: Kubernetes, operator: None, secrets: dict[str, str]):
    for namespace in NAMESPACES:
        said = kubernetes.run("kubectl", "-n", namespace, "get", KINDS, "-o", "json")
        assert found_in(said, secrets) == []
    said = kubernetes.run("kubectl", "get", "secrets", "-n", NAMESPACE, "-o", "json")
    assert found_in(said, secrets) == list(secrets), "the search finds what is there"


def test_no_log_has_a_secret(kubernetes: Kubernetes, operator: None, secrets: dict[str, str]):
    for namespace, pod, container in containers(kubernetes):
        name = pod["metadata"]["name"]
        said = kubernetes.run("kubectl", "-n", namespace, "logs", name, "-c", container)
        assert found_in(said, secrets) == [], f"{name}/{container}"
    files = in_head(kubernetes, "bash", "-c", "cat $(find /tmp/ray -name '*.log' -o -name '*.out' -o -name '*.err')")
    assert "steadyhelm" in files
    assert found_in(files, secrets) == []


def test_no_process_has_the_stores_key_in_its_environment_or_its_arguments(
    kubernetes: Kubernetes, operator: None, secrets: dict[str, str]
):
    looked = set()
    for namespace, pod, container in containers(kubernetes):
        if container == "s3":  # its server reads the key from there, by a secretKeyRef
            continue
        name = pod["metadata"]["name"]
        said = kubernetes.run("kubectl", "-n", namespace, "exec", name, "-c", container, "--", "bash", "-c", PROCESSES)
        assert "PATH=" in said
        # The token of its own API is in every Ray process's environment: KubeRay puts it there.
        assert found_in(said, {"s3": secrets["s3"]}) == [], f"{name}/{container}"
        arguments = "\n".join(line for line in said.splitlines() if not line.startswith("RAY_AUTH_TOKEN="))
        assert found_in(arguments, secrets) == [], f"{name}/{container}"
        looked.add(container)
    assert looked >= {"ray-head", "ray-worker", "autoscaler", "operator"}


def test_the_jobs_api_tells_no_secret(kubernetes: Kubernetes, operator: None, secrets: dict[str, str]):
    bearer = {"X-Ray-Authorization": f"Bearer {secrets['token']}"}
    jobs = kubernetes.api.call("GET", f"{HEAD}/api/jobs/", **bearer).decode()
    ids = [job["submission_id"] for job in json.loads(jobs)]
    assert ids, "there were runs"
    said = [kubernetes.api.call("GET", f"{HEAD}/api/jobs/{name}/logs", **bearer).decode() for name in ids]
    assert found_in("\n".join([jobs, *said]), secrets) == []


def test_pods_are_restricted_one_by_one(kubernetes: Kubernetes, operator: None):
    for namespace, pod, name in containers(kubernetes):
        spec = pod["spec"]
        (container,) = (c for c in spec["containers"] if c["name"] == name)
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"], f"{namespace}/{name}"
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert spec["securityContext"]["runAsNonRoot"]
        assert not spec["automountServiceAccountToken"]


def test_who_reaches_the_head_from_elsewhere_is_the_operators_namespace_alone(kubernetes: Kubernetes, operator: None):
    policies = {found["metadata"]["name"]: found["spec"] for found in kubernetes.api.items(POLICIES)}
    for pod in kubernetes.pods(NAMESPACE):
        labels = pod["metadata"]["labels"].items()
        confining = [spec for spec in policies.values() if spec["podSelector"]["matchLabels"].items() <= labels]
        assert {kind for spec in confining for kind in spec["policyTypes"]} == {"Ingress", "Egress"}, pod["metadata"]

    def peers(name: str, what: str) -> list[tuple[object, object]]:
        return [
            (peer.get(what, {}).get("matchLabels"), [port["port"] for port in rule.get("ports", [])])
            for rule in policies[name].get("ingress", [])
            for peer in rule["from"]
            if what in peer
        ]

    assert peers(RELEASE, "namespaceSelector") == []
    ours = {"kubernetes.io/metadata.name": OPERATOR_NAMESPACE}
    assert peers(f"{RELEASE}-head", "namespaceSelector") == [(ours, ["dashboard", "run-status"])]
    assert peers(f"{RELEASE}-s3", "podSelector") == [({"ray.io/cluster": RELEASE}, ["s3"])]
