"""What the operator decides: each phase against what it may see, told as short stories in a small world."""

from collections.abc import Callable
from typing import Any

import pytest
from steadyhelm.telemetry.status import Checkpoint, Rollouts, Version
from steadyhelm_operator.api import FINALIZER
from steadyhelm_operator.state import (
    CreateCluster,
    DeleteCluster,
    ForgetJob,
    Hold,
    JobView,
    Problem,
    Release,
    StopJob,
    Submit,
    SuspendCluster,
)

from tests.operator.objects import run_file
from tests.operator.world import TEMPLATE, World


def own(**spec: Any) -> World:
    """A run with a cluster of its own."""
    return World(**{"cluster": TEMPLATE, **spec})


def shared(**spec: Any) -> World:
    """A run on a cluster that is there."""
    world = World(**spec)
    world.make_cluster()
    return world


def running(world: World, iterations: int = 0) -> World:
    """The world once the driver works."""
    world.settle()
    world.say("running")
    world.driver_works(iterations)
    world.look()
    assert (world.status.phase, len(world.live)) == ("Running", 1)
    return world


def condition(world: World, kind: str) -> tuple[str, str]:
    (found,) = (c for c in world.status.conditions if c.type == kind)
    return found.status, found.reason


# ---- the way up ----


def test_first_comes_the_finalizer_then_the_cluster_then_the_attempt_then_the_driver():
    world = own()
    seen = []
    for _ in range(8):
        decision = world.look()
        seen += [type(action).__name__ for action in decision.actions]
        world.kuberay()
    assert seen == ["Hold", "CreateCluster", "Submit"]
    assert world.submitted == ["digits.uidofdig.1"]


def test_an_attempt_is_written_down_one_look_before_it_is_submitted():
    world = shared()
    world.look()
    decision = world.look()
    assert (decision.status.attempt, decision.actions, decision.again_s) == (1, (), 0.0)
    assert isinstance(world.look().actions[0], Submit)


def test_what_begins_an_attempt_is_told_once():
    world = own()
    world.settle()
    assert [reason for reason, _ in world.events] == ["CreatingCluster", "AttemptBegins", "Starting"]


def test_a_missing_cluster_is_named_and_waited_for():
    world = World()
    world.settle()
    assert (world.status.phase, world.status.reason) == ("Pending", "ClusterMissing")
    assert "there is no RayCluster 'rl' in ns" in world.status.message
    world.make_cluster()
    world.settle()
    assert len(world.live) == 1


def test_a_cluster_of_somebody_else_under_the_runs_name_is_left_alone():
    world = own()
    world.make_cluster()
    world.settle()
    assert (world.status.phase, world.status.reason, world.submitted) == ("Pending", "NameTaken", [])
    assert world.cluster is not None


def test_a_new_cluster_takes_no_driver_before_all_its_pods_were_ready_once():
    world = own()
    world.look()
    world.look()
    world.cluster |= {"head_ready": True, "provisioned": False}
    world.problems = (Problem(reason="NoCapacity", message="2 of 4 learner pods: 0/3 nodes are available"),)
    world.look()
    assert (world.status.phase, world.status.reason) == ("Provisioning", "NoCapacity")
    assert world.status.message.startswith("2 of 4 learner pods")
    assert condition(world, "ClusterReady") == ("False", "NoCapacity")
    assert ("NoCapacity", "Provisioning: 2 of 4 learner pods: 0/3 nodes are available") in world.events
    assert world.status.attempt == 0


def test_a_bad_run_file_is_named_and_nothing_is_made():
    world = own(run=run_file(learner={"train_batch": 100_000}))
    world.settle()
    assert (world.status.phase, world.status.reason) == ("Failed", "BadRunFile")
    assert "learner.train_batch is 100000, but an iteration has only 256 rollouts" in world.status.message
    assert condition(world, "Accepted") == ("False", "BadRunFile")
    assert world.cluster is None
    world.change(run=run_file())
    world.settle()
    assert (condition(world, "Accepted"), len(world.live)) == (("True", "Valid"), 1)


def test_the_driver_is_told_the_run_and_where_the_store_is():
    world = shared(files={"task.py": "x = 1\n"})
    world.look()
    world.look()
    (request,) = world.look().actions
    assert request.entrypoint == (
        '[ "$STEADYHELM_STORE_URI" ] || { echo "the run has no store: set spec.run.store.uri, or s3.uri of the '
        "cluster's chart\" >&2; exit 2; }; exec steadyhelm run run.yaml --id digits --address auto --log-format json"
        ' --set "store.uri=$STEADYHELM_STORE_URI"'
    )
    assert set(request.files) == {"run.yaml", "task.py"}
    assert request.files["task.py"] == b"x = 1\n"
    assert request.metadata == {"run": "digits", "attempt": "1", "trainingrun": "ns/digits"}


def test_a_run_file_that_names_its_store_is_believed():
    world = shared(run=run_file(store={"uri": "s3://bucket/runs"}), id="mine")
    world.look()
    world.look()
    (request,) = world.look().actions
    assert request.entrypoint == "exec steadyhelm run run.yaml --id mine --address auto --log-format json"
    assert request.submission_id == "mine.uidofdig.1"


def test_a_run_without_a_store_fails_once_and_says_so():
    world = running(shared())
    world.driver_ends("FAILED", 2, "failed with exit code 2, last available logs:\nthe run has no store: set …")
    world.settle()
    assert (world.status.phase, world.status.reason, world.status.attempt) == ("Failed", "BadRunFile", 1)
    assert world.status.message == "the run has no store: set …"


# ---- on the way ----


def test_the_drivers_figures_are_the_status():
    world = running(shared())
    world.committed = 12
    world.say(
        "running",
        version=Version(iteration=12, attempt=1),
        reward=0.75,
        accuracy=0.5,
        staleness=0.25,
        rollouts=Rollouts(ready=3, desired=4),
        checkpoint=Checkpoint(iteration=10, key="digits/checkpoints/10.1"),
        waiting=("4 engines",),
    )
    world.look()
    status = world.status
    assert (status.progress, status.policy_version, status.reward, status.accuracy) == ("12/60", "12.1", 0.75, 0.5)
    assert (status.staleness, status.engines, status.checkpoint.iteration) == (0.25, "3/4", 10)
    assert (status.waiting, status.message, status.reason) == (("4 engines",), "4 engines", "Training")
    assert condition(world, "Progressing") == ("True", "Training")
    assert world.look().notices == ()


def test_what_a_driver_loses_and_replaces_is_told_once_for_each_loss():
    world = running(shared())
    world.say("running", losses=1, lost="reward 0 is lost; another one takes its place")
    world.look()
    world.look()
    assert (world.status.attempts[-1].losses, world.status.phase) == (1, "Running")
    world.say("running", losses=2, lost="a learner rank is lost")
    world.look()
    assert world.status.attempts[-1].lost == "a learner rank is lost"
    told = [text for reason, text in world.events if reason == "ServiceLost"]
    assert told == [
        "Attempt 1 at iteration 0, loss 1: reward 0 is lost; another one takes its place",
        "Attempt 1 at iteration 0, loss 2: a learner rank is lost",
    ]


def test_what_the_driver_misses_is_the_reason_while_it_waits():
    world = running(shared())
    world.say("starting", reason="NoCapacity", message="pool learner lacks 2 of 4 nodes")
    world.look()
    assert (world.status.phase, world.status.reason) == ("Starting", "NoCapacity")
    assert world.status.message == "pool learner lacks 2 of 4 nodes"


def test_a_run_that_ends_well_is_over_and_its_cluster_goes_after_a_while():
    world = running(own(), 60)
    world.driver_ends("SUCCEEDED", 0)
    decision = world.look()
    assert (world.status.phase, world.status.progress, world.status.reason) == ("Succeeded", "60/60", "Finished")
    assert (condition(world, "Complete"), condition(world, "Progressing")) == (
        ("True", "Finished"),
        ("False", "Finished"),
    )
    assert (decision.actions, decision.again_s) == ((), 300.0)
    world.wait(301)
    assert [type(a) for a in world.look().actions] == [DeleteCluster]
    world.settle()
    assert (world.cluster, world.status.phase, world.submitted) == (None, "Succeeded", ["digits.uidofdig.1"])


def test_a_run_that_ends_well_between_two_looks_is_at_its_last_iteration():
    world = running(shared(), 12)
    world.document = None
    world.driver_ends("SUCCEEDED", 0)
    world.look()
    assert (world.status.phase, world.status.progress, world.status.iteration) == ("Succeeded", "60/60", 60)


@pytest.mark.parametrize(
    ("policy", "succeeds", "goes"),
    [("Delete", True, True), ("Delete", False, True), ("DeleteOnSuccess", True, True),
     ("DeleteOnSuccess", False, False), ("Keep", True, False)],
)  # fmt: skip
def test_cleanup_says_when_the_runs_own_cluster_goes(policy: str, succeeds: bool, goes: bool):
    world = running(own(cleanup={"cluster": policy, "afterSeconds": 0}))
    world.driver_ends("SUCCEEDED", 0) if succeeds else world.driver_ends("FAILED", 2)
    world.settle()
    assert (world.cluster is None) is goes


def test_a_cluster_that_is_not_the_runs_is_never_deleted():
    world = running(shared(cleanup={"afterSeconds": 0}))
    world.driver_ends("SUCCEEDED", 0)
    world.settle()
    assert world.cluster is not None


# ---- failures ----

ENDS = {
    "an error of the run": ("FAILED", 1, "", "Failed", "DriverFailed"),
    "killed by the kernel": ("FAILED", 137, "", "Failed", "DriverKilled"),
    "killed, as Python writes it": ("FAILED", -9, "", "Failed", "DriverKilled"),
    "told to end by a node that goes": ("FAILED", 143, "", "Lost", "Interrupted"),
    "told to end before it could listen": ("FAILED", -15, "", "Lost", "Interrupted"),
    "a job that Ray lost": ("FAILED", None, "", "Lost", "DriverLost"),
    "stopped by hand": ("STOPPED", None, "", "Lost", "Interrupted"),
    "not a number": ("FAILED", 1, "NonFinite", "Failed", "NonFinite"),
    "no room for an actor": ("FAILED", 1, "NoCapacity", "Lost", "NoCapacity"),
    "a store that is away": ("FAILED", 1, "StoreUnreachable", "Lost", "StoreUnreachable"),
    "a store that refuses the key": ("FAILED", 1, "StoreRefused", "Failed", "StoreRefused"),
    "a full disk": ("FAILED", 1, "DiskFull", "Failed", "DiskFull"),
    "another driver at the run": ("FAILED", 1, "RunHeld", "Failed", "RunHeld"),
}


@pytest.mark.parametrize(("job", "code", "said", "outcome", "reason"), ENDS.values(), ids=ENDS)
def test_how_an_attempt_ended_decides_whether_it_counts(
    job: str, code: int | None, said: str, outcome: str, reason: str
):
    world = running(shared())
    if said:
        world.say("failed", reason=said, message="what was wrong")
    world.driver_ends(job, code, "log\nlast line")
    world.look()
    last = world.status.last
    assert (last.outcome, last.reason, world.status.failures) == (outcome, reason, int(outcome == "Failed"))
    assert (world.status.phase, world.status.restarts) == ("Recovering", 1)
    (text,) = (text for name, text in world.events if name == reason and "Attempt 1 ended" in text)
    assert ("`steadyhelm logs digits.uidofdig.1`" in text) is (outcome == "Failed")
    world.wait(30)
    world.settle()
    assert world.live == ["digits.uidofdig.2"]


def test_a_driver_that_was_killed_is_told_by_its_signal_and_not_by_the_end_of_its_log():
    world = running(shared())
    world.driver_ends("FAILED", -9, 'exit code -9, last logs:\n{"event": "IterationDone"}')
    world.look()
    assert world.status.attempts[-1].message == "the driver was killed (SIGKILL)"


def ended(status: str, code: int | None, **spec: Any) -> World:
    world = running(shared(**spec))
    world.driver_ends(status, code, "last line")
    return world


def silent() -> World:
    world = running(own())
    world.reachable = False
    return world


def mistrustful() -> World:
    world = silent()
    world.refuses = True
    return world


def headless() -> World:
    world = running(own())
    world.lose_head()
    return world


def abandoned() -> World:
    world = running(shared(cleanup={"stopGraceSeconds": 0}))
    world.reachable = False
    world.delete()
    return world


def taken() -> World:
    world = own()
    world.make_cluster()
    return world


REMEDIES = {
    "no cluster": (World, "ClusterMissing", "install one"),
    "a name that is taken": (taken, "NameTaken", "rename the TrainingRun"),
    "a wrong run file": (lambda: World(run=run_file(learner={"train_batch": 10_000})), "BadRunFile", "lower it"),
    "a driver that fails": (lambda: ended("FAILED", 1), "DriverFailed", "`steadyhelm logs digits.uidofdig.1`"),
    "a driver that is killed": (lambda: ended("FAILED", 137), "DriverKilled", "was killed (SIGKILL)"),
    "the last failure": (
        lambda: ended("FAILED", 1, failurePolicy={"maxAttempts": 1}), "DriverFailed", "suspend and resume it"
    ),
    "a head that is lost": (headless, "HeadUnreachable", "KubeRay replaces a lost head"),
    "a head that is silent": (silent, "HeadUnreachable", "networkPolicy.apiFrom"),
    "a head that takes no token": (mistrustful, "HeadUnreachable", "rbac.tokenSecrets"),
    "a driver that cannot be stopped": (abandoned, "GaveUpStopping", "stop its job"),
}  # fmt: skip


@pytest.mark.parametrize(("made", "reason", "words"), REMEDIES.values(), ids=REMEDIES)
def test_a_warning_says_what_to_do(made: Callable[[], World], reason: str, words: str):
    world = made()
    for _ in range(3):
        world.look()
    warnings = [notice for decision in world.decisions for notice in decision.notices if notice.warning]
    assert [(notice.reason, words in notice.message) for notice in warnings] == [(reason, True)]


@pytest.mark.parametrize(
    ("reason", "code", "message"),
    [("BadData", 2, "record 7 has no label"), ("TakenOver", 1, "another attempt has taken the run over")],
)
def test_what_another_attempt_would_meet_again_is_not_tried_again(reason: str, code: int, message: str):
    world = running(shared(failurePolicy={"backoffSeconds": 0}))
    world.say("failed", reason=reason, message=message)
    world.driver_ends("FAILED", code)
    world.settle()
    assert (world.status.phase, world.status.reason, world.status.message) == ("Failed", reason, message)
    assert (world.status.attempt, world.live) == (1, [])


def test_a_run_that_somebody_else_drives_is_not_taken_from_them():
    world = shared(failurePolicy={"backoffSeconds": 0, "maxAttempts": 3})
    for _ in range(3):
        running(world)
        world.say("failed", reason="RunHeld", message="another driver is running run 'digits'")
        world.driver_ends("FAILED", 1)
        world.look()
    lines = [action.entrypoint for made in world.decisions for action in made.actions if isinstance(action, Submit)]
    assert ["--take-over" in line for line in lines] == [False] * 3
    world.settle()
    assert (world.status.phase, world.status.reason, world.status.attempt) == ("Failed", "RunHeld", 3)


def test_failures_in_a_row_end_the_run():
    world = shared(failurePolicy={"maxAttempts": 3, "backoffSeconds": 0})
    for _ in range(12):
        world.settle()
        world.driver_ends("FAILED", 1, "boom")
    world.look()
    assert (world.status.phase, world.status.attempt, world.status.failures) == ("Failed", 3, 3)
    assert world.status.message == "given up after 3 failed attempts: boom"


def test_an_attempt_that_gets_the_run_further_makes_the_earlier_ones_count_no_more():
    world = shared(failurePolicy={"maxAttempts": 2, "backoffSeconds": 0})
    for _ in range(5):
        running(world, 3)
        world.driver_ends("FAILED", 1)
        world.look()
        assert world.status.failures == 1
    running(world)
    world.driver_ends("FAILED", 1)
    world.settle()
    assert (world.status.phase, world.status.attempt) == ("Failed", 6)


def test_waits_double_up_to_a_bound_and_are_spread():
    world = shared(failurePolicy={"maxAttempts": 99, "backoffSeconds": 8, "maxBackoffSeconds": 40})
    waits = []
    for _ in range(5):
        world.settle()
        world.driver_ends("FAILED", 1)
        waits.append(world.look().again_s)
        world.wait(60)
    assert waits == [6.0, 12.0, 24.0, 30.0, 30.0]  # of 8, 16, 32, 40, 40 with jitter 0.5


def test_no_driver_begins_before_its_time():
    world = shared(failurePolicy={"backoffSeconds": 100})
    running(world)
    world.driver_ends("FAILED", 1)
    world.look()
    world.wait(50)
    world.look()
    assert (world.status.phase, world.live) == ("Recovering", [])
    assert "the next attempt begins at 2026-" in world.status.message
    world.wait(50)
    world.settle()
    assert world.live == ["digits.uidofdig.2"]


@pytest.mark.parametrize("written", ["2026-03-01T00:00:00Z", "garbage", "2026-01-01T00:00:00"])
def test_an_attempt_waits_for_no_time_that_the_operator_could_not_have_meant(written: str):
    world = running(shared(failurePolicy={"backoffSeconds": 10, "maxBackoffSeconds": 60}))
    world.driver_ends("FAILED", 1)
    world.look()
    world.run["status"]["retryAt"] = written
    world.settle(3)
    assert (world.status.attempt, len(world.live)) == (2, 1)


def test_a_clock_that_is_put_back_keeps_no_driver_from_being_given_up():
    world = running(own(cleanup={"stopGraceSeconds": 60}))
    world.reachable = False
    world.wait(30 * 86400)
    world.change(suspend=True)
    world.look()
    world.wait(-30 * 86400)
    world.look()
    world.wait(61)
    world.settle()
    assert (world.status.phase, world.cluster["suspended"]) == ("Suspended", True)


def test_a_clock_that_is_put_back_keeps_no_cluster():
    world = running(own(cleanup={"afterSeconds": 60}))
    world.wait(30 * 86400)
    world.driver_ends("SUCCEEDED", 0)
    world.look()
    world.wait(-30 * 86400)
    world.look()
    world.wait(61)
    world.look()
    assert world.cluster is None


def test_a_run_that_was_given_up_without_an_attempt_is_tried():
    world = own()
    world.settle(2)
    world.run["status"] = {"gaveUp": True}
    world.settle()
    assert (world.status.attempt, world.status.gave_up, len(world.live)) == (1, False, 1)


def test_a_resubmission_takes_the_run_over():
    world = running(shared(failurePolicy={"backoffSeconds": 0}))
    world.driver_ends("FAILED", 1)
    world.look()
    assert world.look().actions[0].entrypoint.split(" --set")[0].endswith("--log-format json --take-over")


def test_a_lost_head_is_waited_for_and_does_not_count():
    world = running(shared(failurePolicy={"backoffSeconds": 0}), 7)
    world.lose_head()
    world.look()
    assert (world.status.phase, world.status.reason) == ("Recovering", "HeadUnreachable")
    world.kuberay()
    world.settle()
    first, second = world.status.attempts
    assert (first.outcome, first.reason, world.status.failures) == ("Lost", "HeadReplaced", 0)
    assert (second.from_iteration, world.live) == (7, ["digits.uidofdig.2"])


def test_a_head_behind_a_broken_network_gets_no_second_driver():
    world = running(shared(failurePolicy={"backoffSeconds": 0}))
    world.reachable = False
    for _ in range(20):
        world.look()
        world.wait(600)
    assert (world.status.reason, world.status.attempt, len(world.live)) == ("HeadUnreachable", 1, 1)
    world.reachable = True
    world.look()
    assert (world.status.phase, world.status.attempt) == ("Running", 1)


def test_a_head_that_stays_silent_is_asked_less_and_less_often():
    world = running(own())
    world.reachable = False
    waits = []
    for _ in range(5):
        waits.append(world.look().again_s)
        world.wait(waits[-1])
    assert waits == [3, 3, 6, 12, 15]


def test_a_lost_cluster_of_the_run_is_made_again():
    world = running(own(failurePolicy={"backoffSeconds": 0}), 5)
    world.lose_cluster()
    world.settle()
    assert world.status.attempts[0].reason == "ClusterLost"
    assert (world.cluster["uid"], world.live) == ("cluster-2", ["digits.uidofdig.2"])
    assert world.status.failures == 0


def test_a_replaced_cluster_under_the_same_name_has_a_new_attempt():
    world = running(shared(failurePolicy={"backoffSeconds": 0}))
    world.lose_cluster()
    world.make_cluster()
    world.settle()
    assert (world.status.attempts[0].reason, world.live) == ("ClusterReplaced", ["digits.uidofdig.2"])


def test_an_operator_that_died_behind_the_submission_adopts_the_job():
    world = shared()
    world.look()
    world.look()
    decision = world.decide()
    for action in decision.actions:
        world.take(action)  # and the operator dies before it writes anything
    world.settle()
    assert (world.submitted, world.live, world.status.attempt) == (["digits.uidofdig.1"], ["digits.uidofdig.1"], 1)


def test_an_operator_that_died_before_the_submission_submits():
    world = shared()
    for _ in range(3):
        world.look(crash_after=1)
        world.look()
    world.settle()
    assert world.live == ["digits.uidofdig.1"]


# ---- suspending, changing, Kueue ----


def test_suspending_stops_the_driver_first_and_then_the_pods():
    world = running(own(), 9)
    world.change(suspend=True)
    assert [type(a) for a in world.look().actions] == [StopJob]
    assert (world.status.phase, world.cluster["suspend"]) == ("Suspending", False)
    assert [type(a) for a in world.look().actions] == [SuspendCluster]
    world.settle()
    assert (world.status.phase, world.status.message) == ("Suspended", "resumes behind iteration 9")
    assert (world.status.last.outcome, world.status.failures, world.cluster["suspended"]) == ("Stopped", 0, True)


def test_an_attempt_that_the_operator_stops_says_why():
    world = running(own())
    world.change(suspend=True)
    world.settle()
    (first,) = world.status.attempts
    assert (first.outcome, first.reason, first.message) == ("Stopped", "Suspended", "the run was suspended")


def test_a_resumed_run_goes_on_where_it_was():
    world = running(own(), 9)
    world.change(suspend=True)
    world.settle()
    world.change(suspend=False)
    world.settle()
    assert (world.live, world.status.last.from_iteration) == (["digits.uidofdig.2"], 9)
    assert world.cluster["uid"] == "cluster-1"


def test_on_a_cluster_of_somebody_else_suspending_stops_the_driver_alone():
    world = running(shared())
    world.change(suspend=True)
    world.settle()
    assert (world.status.phase, world.live, world.cluster["suspend"]) == ("Suspended", [], False)


def test_a_run_that_is_suspended_from_the_start_makes_nothing():
    world = own(suspend=True)
    world.settle()
    assert (world.status.phase, world.cluster, world.submitted) == ("Suspended", None, [])


def test_a_driver_that_cannot_be_reached_is_suspended_with_its_cluster_after_its_grace():
    world = running(own(cleanup={"stopGraceSeconds": 60}))
    world.reachable = False
    world.change(suspend=True)
    assert world.look().actions == ()
    world.wait(61)
    assert [type(a) for a in world.look().actions] == [SuspendCluster]
    world.settle()
    assert (world.status.phase, world.live) == ("Suspended", [])


def test_under_kueue_the_cluster_goes_and_its_suspend_is_never_written():
    labels = {"kueue.x-k8s.io/queue-name": "research"}
    world = running(own(cluster={"template": {"spec": {}, "labels": labels}}))
    world.change(suspend=True)
    world.settle()
    assert (world.status.phase, world.cluster) == ("Suspended", None)
    world.change(suspend=False)
    world.settle()
    assert world.live == ["digits.uidofdig.2"]


def test_a_cluster_that_kueue_holds_back_is_queued():
    labels = {"kueue.x-k8s.io/queue-name": "research"}
    world = own(cluster={"template": {"spec": {}, "labels": labels}})
    world.look()
    world.look()
    world.cluster["suspend"] = True
    world.settle()
    assert (world.status.phase, world.status.reason) == ("Queued", "Queued")
    assert "Kueue's queue 'research' has not admitted the cluster" in world.status.message
    world.cluster["suspend"] = False
    world.settle()
    assert len(world.live) == 1


def test_a_cluster_that_kueue_takes_back_loses_no_attempt():
    labels = {"kueue.x-k8s.io/queue-name": "research"}
    world = running(own(cluster={"template": {"spec": {}, "labels": labels}}), 4)
    world.cluster["suspend"] = True
    world.kuberay()
    world.settle()
    assert (world.status.phase, world.status.failures) == ("Queued", 0)
    assert (world.status.last.outcome, world.status.last.reason) == ("Lost", "ClusterSuspended")


def test_a_changed_template_is_used_after_a_suspension():
    world = running(own())
    changed = {"template": {"spec": {"headGroupSpec": {"x": 1}}}}
    world.change(cluster=changed)
    world.look()
    assert "suspend and resume to use it" in world.status.message
    world.change(suspend=True)
    world.settle()
    world.change(suspend=False)
    world.settle()
    assert (world.cluster["uid"], len(world.live)) == ("cluster-2", 1)


def test_a_changed_run_file_goes_on_from_a_checkpoint_under_the_new_one():
    world = running(shared(), 9)
    world.change(run=run_file(learner={"lr": 2.0e-6}))
    assert [type(a) for a in world.look().actions] == [StopJob]
    assert (world.status.phase, world.status.reason) == ("Recovering", "RunFileChanged")
    world.look()
    (request,) = world.look().actions
    assert "--take-over --accept-changes" in request.entrypoint
    assert b'"lr": 2e-06' in request.files["run.yaml"]
    assert world.status.failures == 0
    world.settle()
    world.lose_head()
    world.settle()
    world.wait(30)
    world.look()
    assert any("--accept-changes" in action.entrypoint for action in world.look().actions)


def test_more_iterations_reopen_a_run_that_had_succeeded():
    world = running(shared(), 60)
    world.driver_ends("SUCCEEDED", 0)
    world.settle()
    world.change(run=run_file(schedule={"iterations": 90}))
    world.settle()
    assert (world.status.phase, world.status.progress, len(world.live)) == ("Starting", "60/90", 1)
    assert (world.status.finished_at, condition(world, "Complete")) == ("", ("False", "NotYet"))


@pytest.mark.parametrize("how", ["another run file", "suspended and resumed"])
def test_a_run_that_was_given_up_can_be_tried_again(how: str):
    world = running(shared())
    world.driver_ends("FAILED", 2)
    world.settle()
    assert world.status.phase == "Failed"
    if how == "another run file":
        world.change(run=run_file(seed=1))
    else:
        world.change(suspend=True)
        world.settle()
        world.change(suspend=False)
    world.settle()
    assert (world.live, world.status.failures) == (["digits.uidofdig.2"], 0)


def test_a_spec_that_becomes_wrong_leaves_the_driver_alone_and_says_so():
    world = running(shared())
    world.change(run=run_file(learner={"train_batch": 100_000}))
    world.settle()
    assert (world.status.phase, world.status.reason, len(world.live)) == ("Running", "BadRunFile", 1)


WRONG = run_file(learner={"train_batch": 100_000})


def test_a_spec_that_becomes_wrong_before_its_driver_began_has_none():
    world = own()
    while not world.status.attempts:
        world.look()
        world.kuberay()
    world.change(run=WRONG)
    world.settle()
    assert (world.status.phase, world.status.reason, world.submitted) == ("Failed", "BadRunFile", [])
    assert (world.status.last.outcome, world.status.last.message) == ("Stopped", "its driver had not begun")
    world.change(run=run_file())
    world.settle()
    assert (world.status.attempt, len(world.live)) == (2, 1)


def test_a_driver_that_is_to_stop_is_asked_again_though_the_spec_became_wrong_meanwhile():
    world = running(shared())
    world.change(run=run_file(seed=1))
    world.reachable = False
    world.settle()
    assert world.status.last.stopping == "RunFileChanged"
    world.change(run=WRONG)
    world.reachable = True
    world.settle()
    assert (world.live, world.status.phase, world.status.reason) == ([], "Failed", "BadRunFile")


def test_a_wrong_spec_can_be_suspended_and_resumed_once_it_is_right():
    world = running(own(), iterations=3)
    world.change(run=WRONG, suspend=True)
    world.settle()
    assert (world.status.phase, world.live, world.cluster["suspended"]) == ("Suspended", [], True)
    assert condition(world, "Accepted") == ("False", "BadRunFile")
    world.change(run=run_file(), suspend=False)
    world.settle()
    assert len(world.live) == 1


@pytest.mark.parametrize(("policy", "goes"), [("Delete", True), ("DeleteOnSuccess", False), ("Keep", False)])
def test_the_cluster_of_a_wrong_spec_goes_once_its_driver_has_ended(policy: str, goes: bool):
    world = running(own(cleanup={"cluster": policy, "afterSeconds": 60}, id="mine"))
    world.change(run=WRONG)
    world.settle()
    assert (len(world.live), world.cluster is None) == (1, False)
    world.driver_ends("FAILED", 1)
    world.settle()
    assert (world.status.phase, world.cluster is None) == ("Failed", False)
    world.wait(61)
    world.settle()
    assert (world.status.phase, world.status.reason, world.cluster is None) == ("Failed", "BadRunFile", goes)
    world.change(run=run_file())
    world.settle()
    assert (world.submitted[-1], len(world.live)) == ("mine.uidofdig.2", 1)


# ---- deletion ----


def test_deleting_stops_the_driver_then_the_cluster_then_lets_go():
    world = running(own())
    world.delete()
    seen = []
    for _ in range(4):
        decision = world.look()
        seen += [type(action).__name__ for action in decision.actions] if decision else []
    assert seen == ["StopJob", "DeleteCluster", "Release"]
    assert (world.run, world.cluster, world.live) == (None, None, [])


def test_deleting_leaves_a_shared_cluster_without_the_jobs_of_the_run():
    world = running(shared(failurePolicy={"backoffSeconds": 0}))
    world.driver_ends("FAILED", 1)
    world.settle()
    assert len(world.jobs) == 2
    world.delete()
    world.look()
    assert [type(a) for a in world.look().actions] == [ForgetJob, ForgetJob, Release]
    assert (world.run, world.jobs) == (None, {})
    assert world.cluster is not None


def test_deleting_waits_for_a_shared_head_until_the_grace_is_over_and_says_what_may_be_left():
    world = running(shared(cleanup={"stopGraceSeconds": 100}))
    world.reachable = False
    world.delete()
    world.look()
    assert (world.status.phase, world.run is not None) == ("Terminating", True)
    world.wait(101)
    decision = world.look()
    assert [type(a) for a in decision.actions] == [Release]
    assert decision.notices[-1].reason == "GaveUpStopping"


def test_deleting_does_not_wait_for_the_silent_head_of_a_cluster_that_goes_anyway():
    world = running(own())
    world.lose_head()
    world.delete()
    assert [type(a) for a in world.look().actions] == [DeleteCluster]
    assert [type(a) for a in world.look().actions] == [Release]


def test_deleting_waits_for_the_pods_of_its_cluster_and_not_for_ever():
    world = running(own())
    world.delete()
    world.settle(2)
    (cluster,) = (a.cluster for d in world.decisions for a in d.actions if isinstance(a, DeleteCluster))
    world.cluster = {"name": cluster.name, "uid": cluster.uid, "owner": cluster.owner, "deleting": True}
    world.cluster |= {"head_ready": False, "suspend": False}  # its pods end within their grace
    for _ in range(20):
        assert world.look().actions == ()
        assert (world.status.phase, world.status.reason) == ("Terminating", "DeletingCluster")
        world.wait(30)
    world.wait(200)
    assert [type(a) for a in world.look().actions] == [Release]


def test_a_run_that_is_deleted_before_it_was_seen_is_left_alone():
    world = own()
    world.run["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert world.look().actions == ()


def moments() -> dict[str, World]:
    """A world in each phase."""
    found = {"Pending": World(), "Provisioning": own()}
    found["Provisioning"].look()
    found["Provisioning"].look()
    found["Starting"] = shared()
    found["Starting"].settle(3)
    found["Running"] = running(own())
    found["Recovering"] = running(own())
    found["Recovering"].driver_ends("FAILED", 1)
    found["Recovering"].look()
    found["Suspending"] = running(own())
    found["Suspending"].change(suspend=True)
    found["Suspending"].look()
    found["Suspended"] = running(own())
    found["Suspended"].change(suspend=True)
    found["Suspended"].settle()
    found["Queued"] = own(cluster={"template": {"spec": {}, "labels": {"kueue.x-k8s.io/queue-name": "q"}}})
    found["Queued"].look()
    found["Queued"].look()
    found["Queued"].cluster["suspend"] = True
    found["Succeeded"] = running(own(), 60)
    found["Succeeded"].driver_ends("SUCCEEDED", 0)
    found["Failed"] = running(own())
    found["Failed"].driver_ends("FAILED", 2)
    for world in found.values():
        world.look()
    return found


PHASES = tuple(moments())


@pytest.mark.parametrize("phase", PHASES)
def test_deleting_leaves_nothing_behind_in(phase: str):
    world = moments()[phase]
    assert world.status.phase == phase
    owner = world.cluster is None or bool(world.cluster["owner"])
    world.delete()
    for _ in range(20):
        world.look()
        world.wait(20)
    assert (world.run, world.live) == (None, [])
    assert world.cluster is None or not owner


@pytest.mark.parametrize("phase", PHASES)
def test_a_second_look_at_the_same_thing_changes_nothing_in(phase: str):
    world = moments()[phase]
    world.settle(40)
    first = world.look()
    second = world.look()
    assert second.status == first.status
    assert second.notices == ()


def test_the_finalizer_stands_before_anything_is_made():
    world = own()
    (action,) = world.look().actions
    assert isinstance(action, Hold)
    assert world.run["metadata"]["finalizers"] == [FINALIZER]


def test_a_cluster_is_made_with_the_run_as_its_owner():
    world = own(cluster={"template": {"spec": {"a": 1}, "labels": {"team": "x"}, "annotations": {"b": "c"}}})
    world.look()
    (action,) = world.look().actions
    assert isinstance(action, CreateCluster)
    metadata = action.manifest["metadata"]
    assert metadata["ownerReferences"] == [
        {"apiVersion": "steadyhelm.dev/v1alpha1", "kind": "TrainingRun", "name": "digits", "uid": "uid-of-digits",
         "controller": True, "blockOwnerDeletion": True}
    ]  # fmt: skip
    assert metadata["labels"]["team"] == "x"
    assert metadata["annotations"]["b"] == "c"
    assert action.manifest["spec"] == {"a": 1}


def test_a_release_is_the_last_thing():
    world = running(own())
    world.delete()
    for _ in range(5):
        world.look()
    assert all(
        isinstance(action, Release) is (action is decision.actions[-1])
        for decision in world.decisions
        for action in decision.actions
        if Release in [type(a) for a in decision.actions]
    )


def test_a_job_that_waits_in_rays_queue_is_starting():
    world = shared()
    world.settle(3)
    (name,) = world.live
    world.jobs[name] = JobView(status="PENDING")
    world.look()
    assert (world.status.phase, world.status.reason) == ("Starting", "Starting")


def test_a_driver_that_serves_no_status_and_began_in_the_future_is_at_work():
    world = shared()
    world.settle()
    world.wait(-86400)
    world.look()
    assert world.status.phase == "Running"


def test_a_driver_that_serves_no_status_is_at_work_after_a_while():
    world = shared()
    world.settle()
    assert (world.status.phase, world.status.iteration) == ("Starting", 0)
    world.wait(121)
    world.look()
    assert (world.status.phase, world.status.reason) == ("Running", "Training")
