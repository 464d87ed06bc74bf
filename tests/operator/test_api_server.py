"""The operator's own process against a real API server, under the rights and the CRD that its chart gives it.

What is not real: the heads (a server of ours answers for the Ray Jobs API and the runs' status), and KubeRay, of which
nothing is here but the status that a RayCluster gets.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from steadyhelm_operator.api import FINALIZER
from steadyhelm_operator.client import Heads, Kubernetes
from steadyhelm_operator.controller import Controller
from steadyhelm_operator.crd import crd
from steadyhelm_operator.handlers import serve
from steadyhelm_operator.testing import READY, SUSPENDED, FakeHeads
from steadyhelm_operator.testing.server import MERGE, Api, api_server, ended, free_port

from tests.charts.objects import ROOT
from tests.operator.judge import VALIDATOR
from tests.operator.objects import run_file, training_run
from tests.operator.test_crd import BAD, GOOD, SPECS
from tests.programs import fetched

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
RUNS = "/apis/steadyhelm.dev/v1alpha1/namespaces/ns/trainingruns"
CLUSTERS = "/apis/ray.io/v1/namespaces/ns/rayclusters"
HEAD = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray-head", "image": "ray"}]}}}
OWN = {"template": {"spec": {"rayVersion": "2.60.0", "headGroupSpec": HEAD, "authOptions": {"mode": "token"}}}}
DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


class Place:
    """An API server, the operator's process, and what stands in for the rest."""

    def __init__(self, admin: Api, operator: Api, heads: FakeHeads, url: str, folder: Path, *more: str) -> None:
        self.admin, self.operator, self.heads, self.folder = admin, operator, heads, folder
        self.kubeconfig = operator.kubeconfig(folder / "operator.kubeconfig")
        self.health, self.metrics = free_port(), free_port()
        self.command = [
            sys.executable, "-m", "steadyhelm_operator", f"--jobs-url={url}", f"--status-url={url}",
            f"--health-port={self.health}", f"--metrics-port={self.metrics}", "--workers=4", *more,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.folder / "operator.log").open("ab")
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        with log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=15)

    def create(self, name: str, **spec: Any) -> dict[str, Any]:
        body = training_run(**{"name": name, "cluster": OWN, **spec})
        return self.admin.must("POST", RUNS, {**body, "metadata": {"name": name}})

    def change(self, name: str, **spec: Any) -> None:
        self.admin.must("PATCH", f"{RUNS}/{name}", {"spec": spec}, MERGE)

    def run(self, name: str) -> dict[str, Any]:
        return self.admin.get(f"{RUNS}/{name}") or {}

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.run(name).get("status") or {}
        return found

    def until(self, name: str, holds: Callable[[dict[str, Any]], bool], seconds: float = 60.0) -> dict[str, Any]:
        """The status once it is so."""
        ends = time.monotonic() + seconds
        while not holds(status := self.status(name)):
            log = (self.folder / "operator.log").read_text()[-3000:]
            alive = self.process is not None and self.process.poll() is None
            assert alive, log
            assert time.monotonic() < ends, f"{json.dumps(status, indent=1)}\n{log}"
            time.sleep(0.3)
        return status

    def phase(self, name: str, phase: str) -> dict[str, Any]:
        return self.until(name, lambda status: status.get("phase") == phase)

    def gone(self, name: str) -> None:
        ends = time.monotonic() + 60
        while self.admin.get(f"{RUNS}/{name}") or self.admin.get(f"{CLUSTERS}/{name}"):
            assert time.monotonic() < ends, self.run(name)
            time.sleep(0.3)

    def events(self, name: str) -> list[dict[str, Any]]:
        found = self.admin.must("GET", "/apis/events.k8s.io/v1/namespaces/ns/events")["items"]
        return [event for event in found if event["regarding"]["name"] == name]

    def collect(self, name: str, finalizers: list[str]) -> None:
        """What stands in for Kubernetes' garbage collector: a cluster goes behind its pods, of which none are here."""
        assert finalizers == ["foregroundDeletion"]
        self.admin.call("PATCH", f"{CLUSTERS}/{name}", {"metadata": {"finalizers": None}}, MERGE)

    def ready(self, stop: threading.Event) -> None:
        """What stands in for KubeRay: RayClusters become ready, or suspended; their tokens are there."""
        while not stop.wait(0.3):
            with contextlib.suppress(AssertionError, OSError):
                for body in self.admin.must("GET", CLUSTERS)["items"]:
                    name = body["metadata"]["name"]
                    if "deletionTimestamp" in body["metadata"]:
                        self.collect(name, body["metadata"]["finalizers"])
                        continue
                    if name.endswith("provisioning"):
                        continue  # there is no room for its pods
                    wanted = SUSPENDED if body["spec"].get("suspend") else READY
                    if (body.get("status") or {}).get("state") != wanted["state"]:
                        self.admin.call("PATCH", f"{CLUSTERS}/{name}/status", {"status": _stamped(wanted)}, MERGE)
                    secret = {"metadata": {"name": name}, "stringData": {"auth_token": "token-of-the-ray-api"}}
                    self.admin.call("POST", "/api/v1/namespaces/ns/secrets", secret)


def _stamped(status: dict[str, Any]) -> dict[str, Any]:
    """A status with what KubeRay's own schema asks of conditions."""
    more = {"lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "Because", "message": ""}
    return {**status, "conditions": [{**more, **condition} for condition in status["conditions"]]}


def programs() -> Path:
    """The folder of Kubernetes' programs."""
    return Path(os.environ.get("STEADYHELM_TEST_PROGRAMS") or fetched("kubernetes"))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, Api, Path]]:
    """A real API server with the CRDs and the operator's rights."""
    folder = tmp_path_factory.mktemp("kubernetes")
    with api_server(programs(), folder) as (admin, operator):
        for namespace in ("ns", "steadyhelm-system"):
            admin.must("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        define(admin, kuberay_crd(), crd())
        grant(admin)
        yield admin, operator, folder


def kuberay_crd() -> dict[str, Any]:
    """The CRD of RayClusters: KubeRay's where there is one, else the stand-in's."""
    stand_in = ROOT / "tests" / "cluster" / "stand_in"
    file = Path(os.environ.get("STEADYHELM_KUBERAY_CRDS", stand_in)) / "ray.io_rayclusters.yaml"
    found: dict[str, Any] = yaml.load(file.read_text(), yaml.CSafeLoader)
    return found


def define(admin: Api, *definitions: dict[str, Any]) -> None:
    """Installs CRDs, and waits until the API server serves their objects."""
    for definition in definitions:
        admin.must("POST", DEFINITION, definition)
    ends = time.monotonic() + 30
    for definition in definitions:
        path = {"trainingruns": RUNS, "rayclusters": CLUSTERS}[definition["spec"]["names"]["plural"]]
        while admin.call("GET", path)[0] != 200:
            assert time.monotonic() < ends
            time.sleep(0.2)


def grant(admin: Api, *words: str) -> None:
    """Gives the operator the rights that its chart renders, and no others."""
    chart = ROOT / "charts" / "steadyhelm-operator"
    command = [fetched("helm"), "template", "steadyhelm-operator", chart, "--namespace", "steadyhelm-system", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for found in yaml.safe_load_all(done.stdout):
        if found and "rbac.authorization.k8s.io" in found["apiVersion"]:
            namespace = found["metadata"].get("namespace")
            place = f"namespaces/{namespace}/" if namespace else ""
            admin.must("POST", f"/apis/{found['apiVersion']}/{place}{found['kind'].lower()}s", found)


@pytest.fixture(scope="module")
def place(api: tuple[Api, Api, Path]) -> Iterator[Place]:
    """All of it, with the operator at work."""
    with at_work(*api) as found:
        yield found


@contextlib.contextmanager
def at_work(admin: Api, operator: Api, folder: Path, *words: str) -> Iterator[Place]:
    """The operator's process with these options, and what stands in for heads, KubeRay and garbage collection."""
    heads = FakeHeads(token="token-of-the-ray-api")
    stop = threading.Event()
    with heads.served() as url:
        found = Place(admin, operator, heads, url, folder, *words)
        keeper = threading.Thread(target=found.ready, args=(stop,), daemon=True)
        keeper.start()
        found.start()
        try:
            yield found
        finally:
            stop.set()
            keeper.join()
            assert found.process is not None
            with ended(found.process):
                pass


# ---- the resource ----


def dry(admin: Api, body: dict[str, Any]) -> tuple[int, Any]:
    """What the API server says to an object, strict about fields as kubectl is; nothing is kept."""
    body = {**body, "metadata": {"name": body["metadata"]["name"]}}
    return admin.call("POST", f"{RUNS}?dryRun=All&fieldValidation=Strict", body)


def test_the_definition_is_accepted_with_all_its_rules(api: tuple[Api, Api, Path]):
    found = api[0].get(f"{DEFINITION}/trainingruns.steadyhelm.dev")
    conditions = {condition["type"]: condition for condition in found["status"]["conditions"]}
    assert conditions["Established"]["status"] == "True"
    assert "NonStructuralSchema" not in conditions


@pytest.mark.parametrize("document", GOOD.values(), ids=GOOD)
def test_the_api_server_takes_good_run_files(api: tuple[Api, Api, Path], document: dict[str, Any]):
    status, answer = dry(api[0], training_run(document))
    assert status == 201, answer
    assert answer["spec"]["run"] == document  # no default was put in


@pytest.mark.parametrize("document", [document for document, _ in BAD.values()], ids=BAD)
def test_the_api_server_refuses_bad_run_files(api: tuple[Api, Api, Path], document: dict[str, Any]):
    status, answer = dry(api[0], training_run(document))
    assert status in (400, 422), answer


@pytest.mark.parametrize("spec", [spec for spec, _ in SPECS.values()], ids=SPECS)
def test_the_api_server_refuses_bad_specs(api: tuple[Api, Api, Path], spec: dict[str, Any]):
    assert dry(api[0], training_run(**spec))[0] in (400, 422)


RULES = {name: found for name, found in BAD.items() if VALIDATOR.is_valid(training_run(found[0]))}


@pytest.mark.parametrize(("document", "words"), RULES.values(), ids=RULES)
def test_the_servers_rules_say_what_the_tests_library_says(
    api: tuple[Api, Api, Path], document: dict[str, Any], words: str
):
    _, answer = dry(api[0], training_run(document))
    assert words in answer["message"]


def test_names_and_what_identifies_a_run_are_guarded(api: tuple[Api, Api, Path]):
    admin = api[0]
    assert dry(admin, training_run(name="1a"))[0] == 422
    body = training_run(name="guarded", id="a", suspend=True)
    admin.must("POST", RUNS, {**body, "metadata": {"name": "guarded"}})
    for change in ({"id": "b"}, {"cluster": {"name": "other"}}, {"id": None}):
        status, answer = admin.call("PATCH", f"{RUNS}/guarded?dryRun=All", {"spec": change}, MERGE)
        assert (status, "cannot change" in answer["message"]) == (422, True), answer
    assert admin.call("PATCH", f"{RUNS}/guarded?dryRun=All", {"spec": {"suspend": False}}, MERGE)[0] == 200
    admin.call("DELETE", f"{RUNS}/guarded")


def test_the_operator_may_do_what_it_does_and_no_more(api: tuple[Api, Api, Path]):
    operator = api[1]
    assert operator.call("GET", RUNS)[0] == 200
    assert operator.call("GET", "/api/v1/namespaces/ns/secrets/none")[0] == 404
    for verb, path in (
        ("GET", "/api/v1/namespaces/ns/secrets"),
        ("GET", "/api/v1/secrets"),
        ("DELETE", f"{RUNS}/none"),
        ("GET", "/api/v1/nodes"),
        ("GET", "/apis/apps/v1/namespaces/ns/deployments"),
        ("DELETE", "/api/v1/namespaces/ns/pods/none"),
        ("POST", "/apis/rbac.authorization.k8s.io/v1/clusterroles"),
    ):
        assert operator.call(verb, path, {} if verb == "POST" else None)[0] == 403, path


# ---- the story ----


def test_from_the_resource_to_its_end(place: Place):
    place.create("story", files={"task.py": "x = 1\n"}, cleanup={"afterSeconds": 0})
    status = place.phase("story", "Running")
    assert (status["attempt"], status["cluster"], status["progress"]) == (1, "story", "0/60")
    assert place.run("story")["metadata"]["finalizers"] == [FINALIZER]
    (job,) = place.heads.head("ns", "story").jobs.values()
    store = '--set "store.uri=$STEADYHELM_STORE_URI"'
    assert job.entrypoint.endswith(f"exec steadyhelm run run.yaml --id story --address auto --log-format json {store}")
    owner = place.admin.get(f"{CLUSTERS}/story")["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["uid"]) == ("TrainingRun", place.run("story")["metadata"]["uid"])
    place.heads.head("ns", "story").iteration = 60
    status = place.phase("story", "Succeeded")
    assert [c["status"] for c in status["conditions"] if c["type"] == "Complete"] == ["True"]
    reasons = {event["reason"] for event in place.events("story")}
    assert {"AttemptBegins", "Finished"} <= reasons
    ends = time.monotonic() + 30
    while place.admin.get(f"{CLUSTERS}/story"):
        assert time.monotonic() < ends, "the cluster was not cleaned up"
        time.sleep(0.3)


def test_the_columns_of_get_tell_how_it_is_going(place: Place):
    place.create("columns")
    place.phase("columns", "Running")
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    _, table = place.admin.call("GET", f"{RUNS}/columns", Accept=accept)
    names = [column["name"] for column in table["columnDefinitions"] if column["priority"] == 0]
    assert names == ["Name", "Phase", "Progress", "Reward", "Engines", "Attempt", "Reason", "Age"]
    assert table["rows"][0]["cells"][:3] == ["columns", "Running", "0/60"]


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("spec.run.schedule.iterations", "Iterations"),
        ("spec.cluster.template", "RayCluster that is made for this run"),
        ("status.staleness", "Mean age of the last batch's tokens"),
    ],
)
def test_kubectl_explains_what_a_field_means(api: tuple[Api, Api, Path], field: str, words: str):
    kubectl = programs() / "kubectl"
    if not kubectl.exists():
        pytest.skip(f"there is no kubectl in {kubectl.parent}")
    kubeconfig = api[0].kubeconfig(api[2] / "admin.kubeconfig")
    command = [kubectl, "explain", f"trainingrun.{field}", "--kubeconfig", kubeconfig]
    environment = {**os.environ, "KUBECACHEDIR": str(api[2] / "kube")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert words in done.stdout, done.stdout + done.stderr


def asked(port: int, path: str) -> tuple[int, str]:
    """HTTP status and text of a server on this machine; 0 where none answers."""
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        answer = urllib3.request("GET", f"http://127.0.0.1:{port}/{path}", retries=False, timeout=20.0)
        return answer.status, answer.data.decode()
    return 0, ""


def test_the_operator_tells_of_its_health_and_of_its_runs(place: Place):
    place.create("counted")
    place.phase("counted", "Running")
    assert asked(place.health, "healthz") == (200, '{"reconciles": "yes"}')
    ends = time.monotonic() + 10
    while 'steadyhelm_operator_runs{phase="Running"}' not in (text := asked(place.metrics, "metrics")[1]):
        assert time.monotonic() < ends, text
        time.sleep(0.2)
    assert 'steadyhelm_operator_requests_total{code="200",resource="trainingruns",verb="PATCH"}' in text


def test_an_operator_that_does_not_get_on_fails_its_probe(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBECONFIG", str(place.kubeconfig))
    kubernetes, port = Kubernetes(), free_port()
    controller = Controller(kubernetes, Heads(kubernetes))

    async def story() -> tuple[int, int]:
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(controller, ["ns"], workers=0, health_port=port, stop=stop))
        ends = time.monotonic() + 20
        while (well := (await asyncio.to_thread(asked, port, "healthz"))[0]) != 200:
            assert time.monotonic() < ends, well
            await asyncio.sleep(0.2)
        controller.beat -= 200  # no thread has taken anything up for so long
        await asyncio.sleep(11)  # kopf remembers an answer for ten seconds
        ill, _ = await asyncio.to_thread(asked, port, "healthz")
        stop.set()
        await serving
        return well, ill

    assert asyncio.run(story()) == (200, 500)


def test_suspended_and_resumed_on_the_same_cluster(place: Place):
    place.create("rests")
    place.phase("rests", "Running")
    place.heads.head("ns", "rests").iteration = 12
    place.change("rests", suspend=True)
    place.phase("rests", "Suspended")
    assert place.heads.live("ns", "rests") == []
    assert place.admin.get(f"{CLUSTERS}/rests")["spec"]["suspend"] is True
    place.change("rests", suspend=False)
    status = place.until("rests", lambda status: status["phase"] == "Running" and status["attempt"] == 2)
    assert (status["progress"], status["attempts"][1]["fromIteration"]) == ("12/60", 12)
    assert (status["failures"], len(place.heads.live("ns", "rests"))) == (0, 1)


def test_a_lost_head_costs_an_attempt_that_does_not_count(place: Place):
    place.create("loses", failurePolicy={"backoffSeconds": 0})
    place.phase("loses", "Running")
    place.heads.lose("ns", "loses")
    status = place.until("loses", lambda status: status["attempt"] == 2 and status["phase"] == "Running")
    assert (status["attempts"][0]["reason"], status["failures"]) == ("HeadReplaced", 0)
    assert any(event["reason"] == "HeadReplaced" for event in place.events("loses"))


def test_a_lost_cluster_is_made_again(place: Place):
    place.create("clusterless", failurePolicy={"backoffSeconds": 0})
    place.phase("clusterless", "Running")
    place.heads.lose("ns", "clusterless")
    place.admin.call("DELETE", f"{CLUSTERS}/clusterless")
    status = place.until("clusterless", lambda status: status["attempt"] == 2 and status["phase"] == "Running")
    assert status["attempts"][0]["outcome"] == "Lost"


def test_an_operator_that_is_killed_at_any_time_leaves_one_driver(place: Place):
    place.create("killed")
    for _ in range(4):
        time.sleep(1.0)
        place.kill()
        place.start()
    place.phase("killed", "Running")
    assert (len(place.heads.live("ns", "killed")), place.status("killed")["attempt"]) == (1, 1)


def test_a_bad_run_file_is_named_in_the_status(place: Place):
    place.create("bad", run=run_file(learner={"train_batch": 100_000}))
    status = place.phase("bad", "Failed")
    assert status["reason"] == "BadRunFile"
    assert "learner.train_batch is 100000" in status["message"]


def test_the_ray_apis_token_is_in_no_object_and_in_no_log(place: Place):
    place.create("secret")
    place.phase("secret", "Running")
    objects = json.dumps([place.admin.must("GET", RUNS), place.events("secret"), place.admin.must("GET", CLUSTERS)])
    assert "token-of-the-ray-api" not in objects + (place.folder / "operator.log").read_text()


STATES = ["Pending", "Provisioning", "Running", "Recovering", "Suspended", "Succeeded", "Failed"]


@pytest.mark.parametrize("state", STATES)
def test_deleting_leaves_nothing(place: Place, state: str):
    name = f"deleted-{state.lower()}"
    more: dict[str, Any] = {"run": run_file(learner={"train_batch": 100_000})} if state == "Failed" else {}
    place.create(name, **({"cluster": {"name": "none"}} if state == "Pending" else more))
    if state not in ("Pending", "Provisioning", "Failed"):
        place.phase(name, "Running")
    if state == "Suspended":
        place.change(name, suspend=True)
    elif state == "Recovering":
        place.heads.head("ns", name).up = False
    elif state == "Succeeded":
        place.heads.head("ns", name).iteration = 60
    place.phase(name, state)
    place.admin.must("DELETE", f"{RUNS}/{name}")
    place.gone(name)
    silent = state == "Recovering"  # its head cannot be told, and goes with the cluster's pods
    assert silent or place.heads.live("ns", name) == []


def test_with_the_rights_in_one_namespace_alone_runs_there_are_looked_after_as_soon_as_kuberay_is_there(tmp_path: Path):
    with api_server(programs(), tmp_path) as (admin, operator):
        for namespace in ("ns", "elsewhere", "steadyhelm-system"):
            admin.must("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        define(admin, crd())
        grant(admin, "--set", "namespaces={ns}")
        assert operator.call("GET", RUNS.replace("/ns/", "/elsewhere/"))[0] == 403
        with at_work(admin, operator, tmp_path, "--namespace=ns") as place:
            elsewhere = {**training_run(name="digits", cluster=OWN), "metadata": {"name": "digits"}}
            admin.must("POST", RUNS.replace("/ns/", "/elsewhere/"), elsewhere)
            place.create("digits")
            place.until("digits", lambda status: status.get("reason") == "NoKubeRay")
            assert asked(place.health, "healthz")[0] == 200
            define(admin, kuberay_crd())
            ends = time.monotonic() + 60
            while asked(place.health, "healthz")[0] != 500:  # kopf remembers an answer for ten seconds
                assert time.monotonic() < ends
                time.sleep(1.0)
            place.kill()  # as the kubelet does by that
            place.start()
            place.phase("digits", "Running")
            admin.call("DELETE", f"{CLUSTERS}/digits")  # a watch alone tells of it
            place.until("digits", lambda status: status["attempt"] == 2 and status["phase"] == "Running")
            assert asked(place.health, "healthz")[0] == 200
            admin.must("DELETE", f"{RUNS}/digits")
            place.gone("digits")
        assert "status" not in (admin.get(RUNS.replace("/ns/", "/elsewhere/") + "/digits") or {})
