"""The loop around the decision: a Kubernetes in memory, heads on real sockets, and the operator's own client."""

import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from steadyhelm.errors import RequestRefusedError, UnreachableError
from steadyhelm_operator.api import FINALIZER
from steadyhelm_operator.client import Heads, MissingError
from steadyhelm_operator.controller import FRESH_S, Controller
from steadyhelm_operator.testing import READY, SUSPENDED, FakeHeads, MemoryKubernetes

from tests.operator.objects import training_run

NAME = ("ns", "digits")
OWN = {"template": {"spec": {"authOptions": {"mode": "disabled"}}}}


class Operator:
    """A controller that looks only when it is told to, at a time that stands still."""

    def __init__(self, heads: FakeHeads, url: str) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.heads, self.kubernetes = heads, MemoryKubernetes(lambda: self.now)
        self.url = url
        self.restart()

    def restart(self) -> None:
        client = Heads(self.kubernetes, self.url, self.url)  # type: ignore[arg-type]
        self.controller = Controller(self.kubernetes, client, clock=lambda: self.now, chance=lambda: 0.5)  # type: ignore[arg-type]
        self.kubernetes.watchers = [self.told]
        for body in self.kubernetes.runs.values():
            self.controller.run_changed(None, body)
        for body in self.kubernetes.clusters.values():
            self.controller.cluster_changed(None, body)

    def told(self, kind: str, verb: str, body: dict[str, Any]) -> None:
        if kind == "run":
            self.controller.run_changed(verb, body)
        else:
            self.controller.cluster_changed(verb, body)

    @property
    def run(self) -> dict[str, Any]:
        return self.kubernetes.runs[NAME]

    @property
    def status(self) -> dict[str, Any]:
        return self.run.get("status", {})

    def looks(self, number: int = 6) -> None:
        for _ in range(number):
            self.controller.look(NAME)
            for body in list(self.kubernetes.clusters.values()):
                wanted = SUSPENDED if body["spec"].get("suspend") else READY
                if body.get("status") != wanted:
                    self.kubernetes.put("cluster", {**body, "status": wanted})
            self.now += timedelta(seconds=3)

    def change(self, **spec: Any) -> None:
        self.kubernetes.put("run", {**self.run, "spec": {**self.run["spec"], **spec}})

    def delete(self) -> None:
        self.kubernetes.put(
            "run", {**self.run, "metadata": {**self.run["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
        )


@pytest.fixture
def operator() -> Iterator[Operator]:
    heads = FakeHeads()
    with heads.served() as url:
        yield Operator(heads, url)


def begun(operator: Operator, **spec: Any) -> Operator:
    operator.kubernetes.put("run", training_run(**{"cluster": OWN, **spec}), "ADDED")
    operator.looks()
    assert operator.status["phase"] == "Running"
    return operator


def test_from_the_resource_to_a_driver_and_its_figures(operator: Operator):
    begun(operator)
    operator.heads.head(*NAME).iteration = 12
    operator.controller._written.clear()
    operator.looks(1)
    assert (operator.status["progress"], operator.status["engines"], operator.status["reward"]) == ("12/60", "1/1", 0.5)
    assert operator.run["metadata"]["finalizers"] == [FINALIZER]
    owner = operator.kubernetes.clusters[NAME]["metadata"]["ownerReferences"][0]
    assert (owner["uid"], owner["controller"]) == ("uid-of-digits", True)
    reasons = [event["reason"] for event in operator.kubernetes.events]
    assert {"AttemptBegins", "CreatingCluster", "Training"} <= set(reasons)


def test_a_run_that_works_costs_no_request_to_kubernetes(operator: Operator):
    begun(operator)
    operator.looks(2)
    operator.kubernetes.calls.clear()
    operator.looks(20)
    assert operator.kubernetes.calls == []


def test_a_run_on_its_way_up_costs_few_requests(operator: Operator):
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")
    operator.looks()
    assert operator.status["phase"] == "Running"
    assert Counter(operator.kubernetes.calls) == {
        "PATCH run": 1, "POST cluster": 1, "PATCH status": 3, "POST event": 3
    }  # fmt: skip


def test_figures_alone_are_not_written_each_time(operator: Operator):
    begun(operator)
    operator.kubernetes.calls.clear()
    for iteration in range(10):
        operator.heads.head(*NAME).iteration = iteration
        operator.looks(1)
    assert operator.kubernetes.calls.count("PATCH status") <= 1


def test_somebody_elses_write_in_between_is_read_before_anything_is_done(operator: Operator):
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")
    operator.looks(4)
    operator.kubernetes.watchers = []  # the watch is late
    body = operator.run
    operator.kubernetes.put("run", {**body, "metadata": {**body["metadata"], "labels": {"a": "b"}}})
    operator.looks(4)
    assert "GET run" in operator.kubernetes.calls
    assert operator.heads.live(*NAME) == ["digits.uidofdig.1"]


def test_an_operator_that_is_restarted_goes_on_with_what_is_there(operator: Operator):
    begun(operator)
    operator.restart()
    operator.looks()
    assert (operator.status["attempt"], operator.heads.live(*NAME)) == (1, ["digits.uidofdig.1"])


def test_that_a_cluster_is_gone_is_believed_of_the_api_server_alone(operator: Operator):
    begun(operator)
    operator.kubernetes.watchers = []
    operator.controller._clusters.clear()  # as behind a restart, before the list of clusters has come
    operator.looks()
    assert operator.status["attempt"] == 1


def test_a_cluster_that_no_watch_told_of_is_met_when_it_is_made(operator: Operator):
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")
    operator.looks(2)
    assert operator.status["reason"] == "CreatingCluster"
    made = operator.kubernetes.clusters[NAME]["metadata"]["uid"]
    operator.controller._clusters.clear()  # as behind a restart, before the list of clusters has come
    operator.kubernetes.watchers = [lambda kind, verb, body: kind == "run" and operator.told(kind, verb, body)]
    operator.looks(6)
    assert (operator.status["clusterUid"], operator.heads.live(*NAME)) == (made, ["digits.uidofdig.1"])
    assert operator.kubernetes.calls.count("POST cluster") == 2


def test_a_lost_head_is_followed_by_another_attempt(operator: Operator):
    begun(operator, failurePolicy={"backoffSeconds": 0})
    operator.heads.lose(*NAME)
    operator.looks()
    assert operator.heads.live(*NAME) == ["digits.uidofdig.2"]
    assert "--take-over" in next(iter(operator.heads.head(*NAME).jobs.values())).entrypoint
    assert operator.status["attempts"][0]["reason"] == "HeadReplaced"


def test_suspended_and_resumed(operator: Operator):
    begun(operator)
    operator.change(suspend=True)
    operator.looks()
    assert (operator.status["phase"], operator.heads.live(*NAME)) == ("Suspended", [])
    assert operator.kubernetes.clusters[NAME]["spec"]["suspend"] is True
    operator.change(suspend=False)
    operator.looks(8)
    assert operator.heads.live(*NAME) == ["digits.uidofdig.2"]


def test_deleted_with_everything_that_it_had(operator: Operator):
    begun(operator)
    operator.delete()
    operator.looks()
    assert (operator.kubernetes.runs, operator.kubernetes.clusters, operator.heads.live(*NAME)) == ({}, {}, [])
    assert operator.controller.phases() == []


def test_a_server_that_fails_is_asked_again_later_and_the_user_is_told_once(operator: Operator):
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")

    def refuse(manifest: Any) -> Any:
        raise UnreachableError("the Kubernetes API does not answer")

    create, operator.kubernetes.create_cluster = operator.kubernetes.create_cluster, refuse
    operator.looks(5)
    told = [event for event in operator.kubernetes.events if event["reason"] == "ClusterUnreachable"]
    assert len(told) == 1
    assert next(operator.controller._pauses[NAME]) == 16.0
    operator.kubernetes.create_cluster = create
    operator.looks()
    assert operator.heads.live(*NAME) == ["digits.uidofdig.1"]


REFUSED = {
    "NoKubeRay": (MissingError("404"), "install KubeRay"),
    "ClusterRefused": (RequestRefusedError("POST …: HTTP 422: spec.headGroupSpec: Required value"), "Required value"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_cluster_that_cannot_be_made_is_named_in_the_status_until_it_can(operator: Operator, reason: str):
    error, words = REFUSED[reason]
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")

    def refuse(manifest: Any) -> Any:
        raise error

    create, operator.kubernetes.create_cluster = operator.kubernetes.create_cluster, refuse
    operator.looks(5)
    assert (operator.status["phase"], operator.status["reason"]) == ("Provisioning", reason)
    assert words in operator.status["message"]
    (ready,) = (found for found in operator.status["conditions"] if found["type"] == "ClusterReady")
    assert (ready["status"], ready["reason"]) == ("False", reason)
    told = [event["type"] for event in operator.kubernetes.events if event["reason"] == reason]
    assert told == ["Warning"]
    operator.kubernetes.create_cluster = create
    operator.looks()
    assert operator.status["phase"] == "Running"


def test_a_cluster_for_which_kuberay_makes_no_pods_is_named_within_a_minute(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("steadyhelm_operator.controller.FRESH_S", 0.0)
    monkeypatch.setattr("steadyhelm_operator.controller.PODS_S", 0.0)
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")
    reasons = []
    for _ in range(7):
        operator.controller.look(NAME)
        reasons.append(operator.status.get("reason"))
        operator.now += timedelta(seconds=10)
    assert reasons[2:5] == ["PodsNotReady"] * 3
    assert (operator.status["phase"], operator.status["reason"]) == ("Provisioning", "NoPods")
    assert "kubectl describe raycluster digits -n ns" in operator.status["message"]
    operator.looks()
    assert operator.status["phase"] == "Running"


def test_the_longest_wait_is_of_one_run_and_not_of_runs_that_take_turns(operator: Operator):
    def phase(name: str, phase: str) -> None:
        operator.controller.run_changed("MODIFIED", {**training_run(name=name), "status": {"phase": phase}})

    waits = []
    for first, second in (("Starting", "Running"), ("Running", "Provisioning"), ("Starting", "Recovering")):
        phase("a", first)
        phase("b", second)
        waits.append(operator.controller.longest_wait_s())
        operator.now += timedelta(seconds=100)
    assert waits == [0.0, 0.0, 100.0]
    phase("b", "Succeeded")
    assert operator.controller.longest_wait_s() == 100.0


def test_what_is_wrong_with_pods_is_asked_now_and_then(operator: Operator):
    operator.kubernetes.pod_list = [
        {
            "metadata": {"labels": {"app.kubernetes.io/component": "learner"}},
            "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]},
        }
    ]
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")
    for _ in range(6):
        operator.controller.look(NAME)
        operator.now += timedelta(seconds=10)
    assert (operator.status["phase"], operator.status["reason"]) == ("Provisioning", "NoCapacity")
    assert operator.kubernetes.calls.count("GET pods") == 1


def test_pods_that_have_just_been_made_are_not_asked_for(operator: Operator):
    operator.kubernetes.put("run", training_run(cluster=OWN), "ADDED")
    for _ in range(4):
        operator.controller.look(NAME)
    assert (operator.status["reason"], operator.kubernetes.calls.count("GET pods")) == ("PodsNotReady", 0)
    operator.now += timedelta(seconds=FRESH_S + 1)
    operator.controller.look(NAME)
    assert operator.kubernetes.calls.count("GET pods") == 1


def test_threads_look_after_many_runs_until_all_are_done():
    heads = FakeHeads(pace_s=0.001, iterations=20)
    kubernetes = MemoryKubernetes()
    with heads.served() as url:
        controller = Controller(kubernetes, Heads(kubernetes, url, url))  # type: ignore[arg-type]

        def told(kind: str, verb: str, body: dict[str, Any]) -> None:
            (controller.run_changed if kind == "run" else controller.cluster_changed)(verb, body)
            if kind == "cluster" and verb == "ADDED":
                kubernetes.put("cluster", {**body, "status": READY})

        kubernetes.watchers.append(told)
        controller.start(workers=4)
        try:
            for number in range(12):
                kubernetes.put("run", training_run(name=f"run-{number}", cluster=OWN), "ADDED")
            ends = time.monotonic() + 60
            while controller.phases().count("Succeeded") < 12 and time.monotonic() < ends:
                time.sleep(0.1)
        finally:
            assert controller.healthy()
            controller.stop()
    assert controller.phases() == ["Succeeded"] * 12
    assert all(len(head.jobs) == 1 for head in heads.heads.values())
    assert controller.metrics.registry.get_sample_value("steadyhelm_operator_submissions_total") == 12.0
