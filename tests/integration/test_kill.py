"""Real processes, really killed: nothing is lost or trained twice, and the numbers stay the same bit for bit."""

import os
import signal

import psutil
import pytest
from steadyhelm.data.types import ObjectRef
from steadyhelm.store.records import from_json
from steadyhelm.telemetry import metrics as names

pytestmark = [pytest.mark.runs, pytest.mark.timeout(900)]


def test_the_learner_reads_some_of_a_batch_before_it_is_committed(undisturbed):
    shares = [metrics[names.PREFETCHED] for metrics in undisturbed.metrics().values() if names.PREFETCHED in metrics]
    assert len(shares) == 6
    assert max(shares) > 0.0  # the first of its four shards is there long before the last


def test_a_killed_driver_resumes_with_the_same_numbers_and_leaves_no_process_behind(make_run, undisturbed):
    run = make_run()
    run.start()
    run.wait_for(lambda log: log.last_iteration >= 3)
    tree = run.tree()
    run.kill(run.process.pid)
    assert run.left_of(tree) == []
    run.start()
    assert run.finish() == 0, run.text()
    assert run.log.attempt == 2
    assert run.trained() == undisturbed.trained()
    assert len(set(run.trained())) == len(run.trained()) == 96
    finished = run.log.finished()
    assert finished is not None
    model = [from_json(ObjectRef, ref, "the model") for ref in finished.pop("model")]
    assert finished == {"iterations": 6, "ledger": {"trained": 96}, "ledger_after": 0}
    assert any(run.store.read(ref) and ref.key.endswith("/model/model.safetensors") for ref in model)
    assert run.exact_metrics() == undisturbed.exact_metrics()


def test_killed_actors_and_a_killed_rank_are_replaced_while_the_run_goes_on(make_run, undisturbed):
    run = make_run()
    run.start("--set", "runtime.wait_notice_s=2", "--set", "weights.type=broadcast")
    run.wait_for(lambda log: log.last_iteration >= 1)
    run.kill(run.pid_of("ray::RolloutActor"))
    scorers = run.pids_of("ray::ScorerActor")
    assert len(scorers) == 2  # the reward's and the reference's
    for pid in scorers:
        run.kill(pid)
    run.wait_for(lambda log: log.last_iteration >= 3)
    kill_rank_inside_a_collective(run)
    assert run.finish() == 0, run.text()
    assert "another one takes its place" in run.text()
    assert "goes on from the last checkpoint" in run.text()
    assert run.trained() == undisturbed.trained()
    assert run.exact_metrics() == undisturbed.exact_metrics()


def kill_rank_inside_a_collective(run):
    """Stands one of two ranks still until the other waits for it in the middle of a step, then kills it."""
    ranks = run.pids_of("ray::RayTrainWorker")
    assert len(ranks) == 2
    waits = run.text().count("it steps iteration")
    os.kill(ranks[0], signal.SIGSTOP)
    run.wait_until(lambda: run.text().count("it steps iteration") > waits)
    assert psutil.Process(ranks[1]).is_running()
    run.kill(ranks[0])


def test_a_signal_ends_the_run_cleanly_and_says_how_to_go_on(make_run, undisturbed):
    run = make_run()
    run.start()
    run.wait_for(lambda log: log.last_iteration >= 2)
    tree = run.tree()
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 128 + signal.SIGTERM, run.text()
    assert run.left_of(tree) == []
    assert "steadyhelm run run.yaml --id small-transformers goes on" in run.text()
    checkpoint = run.log.checkpoint()
    assert checkpoint is not None
    assert checkpoint.version.iteration == run.log.last_iteration
    run.start()
    assert run.finish() == 0, run.text()
    assert run.exact_metrics() == undisturbed.exact_metrics()


def test_a_finished_run_says_so_and_a_changed_run_file_is_refused(undisturbed):
    before = len(undisturbed.log.entries)
    undisturbed.start()
    assert undisturbed.finish() == 0
    assert "is finished" in undisturbed.text()
    undisturbed.start("--set", "learner.lr=0.5")
    assert undisturbed.finish() == 2
    assert "learner.lr: 0.001 → 0.5" in undisturbed.text()
    assert len(undisturbed.log.entries) == before


def test_a_signal_ends_an_evaluation_with_its_exit_code_and_leaves_no_process_behind(make_run):
    run = make_run()
    run.start("--set", "data.eval=digits.py:eval_pairs", command="eval")
    run.wait_until(lambda: run.find("ray::RolloutActor") is not None)
    tree = run.tree()
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 128 + signal.SIGTERM, run.text()
    assert "SIGTERM stopped it; there is no result." in run.text()
    assert run.left_of(tree) == []
