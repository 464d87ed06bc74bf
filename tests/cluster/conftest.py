"""The Kubernetes of these tests, KubeRay or its stand-in on it, and the programs that they take."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import yaml
from steadyhelm_operator.testing.server import ended

from tests.cluster.api import Api, ApiError
from tests.cluster.kubernetes import Kubernetes
from tests.cluster.node.machine import NoNodeError, node
from tests.cluster.release import CHART, NAMESPACE, OPERATOR_CHART, OPERATOR_NAMESPACE, RELEASE, ROOT, S3_PORT
from tests.programs import fetched

KEEP = "STEADYHELM_KEEP_RELEASE" in os.environ
"""Whether what is installed stays, for the next try on a cluster that KUBECONFIG names."""
FAILED = pytest.StashKey[str]()
RAY_CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayclusters.ray.io"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes which step of the story on the cluster has failed."""
    report = yield
    if report.failed and item.get_closest_marker("cluster"):
        item.session.stash.setdefault(FAILED, item.name)
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Behind a step that failed no other is taken, each of which would wait for what does not come."""
    if item.get_closest_marker("cluster") and (failed := item.session.stash.get(FAILED, "")):
        pytest.skip(f"the story has ended with {failed}")


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    """The cluster that KUBECONFIG names; else a node of this machine's own, for as long as the tests run."""
    folder = tmp_path_factory.mktemp("kubernetes")
    programs = {"helm": fetched("helm")}
    with contextlib.ExitStack() as stack:
        if os.environ.get("KUBECONFIG"):
            kubeconfig, inside, init = os.environ["KUBECONFIG"], (), 0
            programs["kubectl"] = Path(
                shutil.which("kubectl") or pytest.skip("KUBECONFIG is set, and there is no kubectl")
            )
        else:
            built = fetched("kubernetes")
            try:
                own = stack.enter_context(node(built, fetched("node-images")))
            except NoNodeError as error:
                pytest.fail(str(error))  # whoever runs this tier wants to know that nothing was tested
            kubeconfig, inside, init = str(own.kubeconfig), own.inside, own.init
            programs["kubectl"] = built / "kubectl"
        proxy = folder / "api"
        found = Kubernetes(
            api=Api(proxy), kubeconfig=kubeconfig, inside=inside, init=init, folder=folder, programs=programs
        )
        serve = found.command("kubectl", "proxy", f"--unix-socket={proxy}")
        stack.enter_context(ended(subprocess.Popen(serve, env=found.environment, stdout=subprocess.DEVNULL)))
        found.until(proxy.exists, "kubectl proxy listens", seconds=30)
        yield found


@pytest.fixture(scope="session")
def kuberay(kubernetes: Kubernetes) -> Iterator[str]:
    """``kuberay`` where the cluster has it, else our stand-in: who turns RayClusters into pods here."""
    selector = {"app.kubernetes.io/name": "kuberay-operator"}
    if kubernetes.api.items("/apis/apps/v1/deployments", **selector):
        yield "kuberay"
        return
    if kubernetes.api.get(RAY_CRD) is None:
        folder = Path(os.environ.get("STEADYHELM_KUBERAY_CRDS", Path(__file__).parent / "stand_in"))
        kubernetes.run("kubectl", "create", "-f", folder / "ray.io_rayclusters.yaml")
    kubernetes.until(lambda: _served(kubernetes.api), "RayClusters are served", seconds=60)
    log = (kubernetes.folder / "stand_in.log").open("wb")
    command = [sys.executable, "-m", "tests.cluster.stand_in", str(kubernetes.api.proxy)]
    with log, ended(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)):
        yield "stand-in"


def _served(api: Api) -> bool:
    """Whether the API server has taken the new kind up."""
    try:
        return api.get("/apis/ray.io/v1/rayclusters") is not None
    except ApiError:
        return False


@pytest.fixture(scope="session")
def images() -> dict[str, object]:
    """Values of the cluster's chart by which pods find images: the node's own, or those of STEADYHELM_TEST_VALUES."""
    if os.environ.get("KUBECONFIG"):
        file = os.environ.get("STEADYHELM_TEST_VALUES")
        if file is None:
            pytest.fail("STEADYHELM_TEST_VALUES names no file with values by which this cluster finds the images")
        found: dict[str, object] = yaml.safe_load(Path(file).read_text())
        return found
    return {"image": {"registry": "localhost"}, "s3": {"embedded": {"image": "localhost/steadyhelm-s3:1"}}}


@pytest.fixture(scope="session")
def release(kubernetes: Kubernetes, kuberay: str, images: dict[str, object]) -> Iterator[str]:
    """The chart's smallest example in a namespace that takes *restricted* pods alone; tells who is KubeRay."""
    with _namespace(kubernetes, NAMESPACE):
        values = kubernetes.folder / "values.yaml"
        # The tests' own S3 servers are none that the chart knows of.
        egress = [{"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"], "ports": [443, S3_PORT]}]
        network = {"networkPolicy": {"apiFrom": [OPERATOR_NAMESPACE], "egress": egress}}
        values.write_text(yaml.safe_dump(images | network))
        files = ["--values", CHART / "examples" / "small-cpu.yaml", "--values", values]
        kubernetes.run("helm", "upgrade", "--install", RELEASE, CHART, "--namespace", NAMESPACE, *files)
        yield kuberay


@pytest.fixture(scope="session")
def operator(kubernetes: Kubernetes, release: str, images: dict[str, object]) -> Iterator[None]:
    """Our operator, beside the release."""
    with _namespace(kubernetes, OPERATOR_NAMESPACE):
        values = kubernetes.folder / "operator.yaml"
        values.write_text(yaml.safe_dump({"image": images["image"]}))
        where = ("--namespace", OPERATOR_NAMESPACE)
        kubernetes.run(
            "helm", "upgrade", "--install", "operator", OPERATOR_CHART, *where, "--values", values, timeout_s=120
        )
        try:
            yield
        finally:
            if not KEEP:
                kubernetes.run("helm", "uninstall", "operator", *where, "--ignore-not-found", "--wait", timeout_s=120)


@contextlib.contextmanager
def _namespace(kubernetes: Kubernetes, name: str) -> Iterator[None]:
    place = "/api/v1/namespaces"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubernetes.api.create(place, {"metadata": {"name": name, "labels": labels}})
    try:
        yield
    finally:
        if not KEEP:
            kubernetes.api.delete(f"{place}/{name}")
            gone = f"{place}/{name}"
            kubernetes.until(lambda: kubernetes.api.get(gone) is None, f"namespace {name} is gone", seconds=180)
