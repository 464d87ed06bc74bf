"""What the driver adds to the loop, and what a crash leaves of it: evaluations, metrics, model, report, the end."""

import pytest
from steadyhelm.testing.memory_store import InjectedCrash, MemoryStore

EVERY_ID = [f"0:{n}" for n in range(16)]
EVALUATED = {0, 2, 4}


def evaluated(metrics: dict[int, dict[str, float]]) -> set[int]:
    return {iteration for iteration, values in metrics.items() if "eval/accuracy" in values}


async def test_a_run_ends_with_metrics_of_each_iteration_and_evaluation(start):
    run = start(MemoryStore())
    assert await run.follow() == EVERY_ID
    metrics = run.exact_metrics()
    assert sorted(metrics) == [0, 1, 2, 3, 4]
    assert evaluated(metrics) == EVALUATED
    assert metrics[2]["eval/pairs"] == 4.0


async def test_an_evaluation_outlives_the_replay_of_its_iteration(start):
    store = MemoryStore()
    undisturbed = start(MemoryStore())
    await undisturbed.follow()
    store.fail("fake/checkpoints/*")  # behind iteration 3, which is not evaluated; 1 to 3 are stepped again
    with pytest.raises(InjectedCrash):
        await start(store).follow()
    resumed = start(store.copy())
    assert await resumed.follow() == EVERY_ID
    assert evaluated(resumed.exact_metrics()) == EVALUATED
    assert resumed.exact_metrics() == undisturbed.exact_metrics()


async def test_an_evaluation_whose_metrics_were_not_put_comes_back_from_the_log(start):
    store = MemoryStore()
    store.fail("fake/metrics/*", nth=3)  # of iteration 2, whose evaluation is committed
    with pytest.raises(InjectedCrash):
        await start(store).follow()
    resumed = start(store.copy())
    assert 2 in {entry.payload["iteration"] for entry in resumed.log.entries if entry.kind == "eval"}
    await resumed.follow()
    assert evaluated(resumed.exact_metrics()) == EVALUATED
