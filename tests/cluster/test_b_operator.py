"""A TrainingRun on a real Kubernetes: it goes on with a run, is hurt in every part, rests, and comes to its end.

One run, ``STORY``, which somebody has submitted by hand before, lives through all of it; its commit log is read at the
end.
"""

import pytest

from tests.cluster.api import ApiError
from tests.cluster.kubernetes import Kubernetes, running
from tests.cluster.lineage import in_head, lineage
from tests.cluster.release import (
    CHART,
    NAMESPACE,
    OPERATOR_CHART,
    OPERATOR_NAMESPACE,
    RELEASE,
    kill,
    one_running,
    replaced,
)
from tests.cluster.runs import (
    RUNS,
    STORY,
    delete,
    digits_records,
    digits_run,
    document,
    events,
    goes_on,
    own_cluster,
    status,
    training_run,
    until,
)
from tests.cluster.strange_store import PODS, strange_store

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

KILL_DRIVERS = "kill -9 $(grep -lzE '(^|/)steadyhelm$' /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3)"


def test_a_training_run_goes_on_with_the_run_that_was_submitted(kubernetes: Kubernetes, operator: None):
    made = kubernetes.api.create(RUNS, training_run(STORY, digits_run(iterations=5000)))
    assert made
    begun = until(kubernetes, STORY, "it is at work", lambda said: said["phase"] == "Running" and said["iteration"] > 0)
    assert begun["iterations"] == 5000
    on = goes_on(kubernetes, STORY, attempt=1)
    assert document(kubernetes)["version"]["attempt"] == 3, "the third attempt at the run in the store"
    assert (on["engines"], on["cluster"]) == ("1/1", RELEASE)


def test_an_upgrade_of_both_charts_leaves_the_run_alone(kubernetes: Kubernetes, operator: None):
    before = {pod["metadata"]["uid"] for pod in kubernetes.pods(NAMESPACE, **{"ray.io/cluster": RELEASE})}
    upgrade = ("helm", "upgrade", "--reuse-values", "--force-conflicts")
    kubernetes.run(*upgrade, RELEASE, CHART, "--namespace", NAMESPACE, "--set", "podLabels.story=upgraded")
    where = ("operator", OPERATOR_CHART, "--namespace", OPERATOR_NAMESPACE)
    kubernetes.run(*upgrade, *where, "--set", "podLabels.story=upgraded", "--wait", timeout_s=180)
    goes_on(kubernetes, STORY, attempt=1)
    after = {pod["metadata"]["uid"] for pod in kubernetes.pods(NAMESPACE, **{"ray.io/cluster": RELEASE})}
    assert after == before


@pytest.mark.parametrize("pool", ["reward", "learner"])
def test_a_run_outlives_a_pod_of_its_services_and_says_so(kubernetes: Kubernetes, operator: None, pool: str):
    losses = status(kubernetes, STORY)["attempts"][-1]["losses"]
    fresh = replaced(kubernetes, pool)
    assert fresh["metadata"]["labels"]["story"] == "upgraded", "new pods are of the upgraded chart"
    said = until(kubernetes, STORY, "it says so", lambda said: said["attempts"][-1]["losses"] > losses)
    assert pool in said["attempts"][-1]["lost"]
    assert ("ServiceLost", pool) in [(reason, pool) for reason, text in events(kubernetes, STORY) if pool in text]
    goes_on(kubernetes, STORY, attempt=1)


def test_a_killed_driver_is_resubmitted_though_the_operator_was_killed_too(kubernetes: Kubernetes, operator: None):
    (victim,) = kubernetes.pods(OPERATOR_NAMESPACE)
    in_head(kubernetes, "bash", "-c", KILL_DRIVERS)
    kill(kubernetes, victim)

    on = goes_on(kubernetes, STORY, attempt=2)
    first = on["attempts"][0]
    assert (first["outcome"], first["reason"]) == ("Failed", "DriverKilled")
    assert first["message"] == "the driver was killed (SIGKILL)"
    assert any(running(pod) for pod in kubernetes.pods(OPERATOR_NAMESPACE))


def test_a_lost_head_is_followed_by_another_attempt_on_the_next(kubernetes: Kubernetes, operator: None):
    fresh = replaced(kubernetes, "headgroup")
    on = goes_on(kubernetes, STORY, attempt=3, seconds=300)
    second = on["attempts"][1]
    assert (second["outcome"], second["reason"]) == ("Lost", "HeadReplaced")
    assert on["failures"] == 0, "a lost head is no failure of the run"
    assert fresh["metadata"]["name"] == one_running(kubernetes, "headgroup")["metadata"]["name"]


FAULTS = {
    # name: (reason, words of the message)
    "wrong-file": ("BadRunFile", "'nowhere.py'"),
    "no-image": ("ImagePull", "image localhost/nowhere:1 cannot be pulled"),
    "no-place": ("NoCapacity", "1 of 1 learner pods"),
    "full-disk": ("DiskFull", "the store is full"),
    "wrong-key": ("StoreRefused", "give right credentials"),
}


def test_a_run_that_rests_leaves_its_place_and_what_is_wrong_with_others_is_named(
    kubernetes: Kubernetes, operator: None
):
    kubernetes.api.merge(f"{RUNS}/{STORY}", {"spec": {"suspend": True}})
    full = strange_store(kubernetes, "full", full=True)
    stranger = strange_store(kubernetes, "stranger", stranger=True)
    rests = until(kubernetes, STORY, "it rests", lambda said: said["phase"] == "Suspended")
    assert rests["attempts"][-1]["outcome"] == "Stopped"

    run = digits_run(iterations=9)
    nowhere = {"steadyhelm.dev/there-is-none": "true"}
    made = {
        "wrong-file": training_run("wrong-file", run | {"model": {"factory": "nowhere.py:build", "dtype": "float32"}}),
        "no-image": training_run(
            "no-image", run, cluster=own_cluster(kubernetes, "learner", image="localhost/nowhere:1")
        ),
        "no-place": training_run("no-place", run, cluster=own_cluster(kubernetes, "learner", nodeSelector=nowhere)),
        "full-disk": training_run("full-disk", run | {"store": {"uri": full}}),
        "wrong-key": training_run("wrong-key", run | {"store": {"uri": stranger}}),
    }
    for manifest in made.values():
        manifest["spec"]["failurePolicy"] = {"backoffSeconds": 300}  # what is wrong with one is not tried again here
        assert kubernetes.api.create(RUNS, manifest)
    for name, (reason, words) in FAULTS.items():
        said = until(kubernetes, name, f"{reason} is named", lambda said, r=reason: said["reason"] == r)
        assert words in said["message"], said
        assert said["phase"] != "Running"
    for name in made:
        delete(kubernetes, name)
    for pod in ("full", "stranger"):
        kubernetes.api.delete(f"{PODS}/{pod}")


def test_a_cluster_of_its_own_comes_with_a_run_trains_it_and_goes_with_it(kubernetes: Kubernetes, operator: None):
    own = own_cluster(kubernetes, "rollout", "reward", "learner")
    assert kubernetes.api.create(RUNS, training_run("own", digits_run(iterations=3), cluster=own))
    done = until(kubernetes, "own", "it is done", lambda said: said["phase"] == "Succeeded", seconds=300)
    assert (done["progress"], done["attempt"], done["cluster"]) == ("3/3", 1, "own")
    lineage(kubernetes, "own", digits_records()).check()
    delete(kubernetes, "own")
    left = [name for name in kubernetes.left(NAMESPACE) if name.partition("/")[2].startswith("own")]
    assert not left


def test_a_misspelt_field_is_refused_by_kubernetes_itself(kubernetes: Kubernetes, operator: None):
    run = digits_run(iterations=9)
    run["schedule"]["iteratoins"] = 3
    with pytest.raises(ApiError, match="iteratoins") as refused:
        kubernetes.api.call("POST", f"{RUNS}?fieldValidation=Strict", training_run("misspelt", run))
    assert refused.value.code in (400, 422)


def test_a_run_that_rested_goes_on_where_it_was_and_comes_to_its_end(kubernetes: Kubernetes, operator: None):
    rests = status(kubernetes, STORY)
    last = rests["iteration"] + 4
    changed = {"suspend": False, "run": {"schedule": {"iterations": last}}}
    kubernetes.api.merge(f"{RUNS}/{STORY}", {"spec": changed})
    done = until(kubernetes, STORY, "it is done", lambda said: said["phase"] == "Succeeded", seconds=240)
    assert (done["progress"], done["attempt"]) == (f"{last}/{last}", 4)
    assert done["attempts"][-1]["fromIteration"] == rests["iteration"]

    left = lineage(kubernetes, STORY, digits_records())
    left.check()
    assert (left.iterations, left.finished) == (last, True)
