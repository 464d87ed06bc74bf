import pytest
from steadyhelm.data.types import BatchManifest, ObjectRef, PolicyVersion, ShardRecord
from steadyhelm.errors import FatalError
from steadyhelm.store.ledger import Ledger, Record


def batch(iteration, outcomes, *shards):
    records = tuple(
        ShardRecord(
            shard=number,
            rollout=ObjectRef(key="k", num_bytes=0, xxh3=""),
            prompt_ids=tuple(ids),
            num_tokens=0,
            min_version=0,
            max_version=0,
            attempt=1,
            valid=tuple(ids.values()),
        )
        for number, ids in enumerate(shards)
    )
    policy = PolicyVersion(iteration=iteration - 1, attempt=1)
    return BatchManifest(iteration=iteration, policy=policy, shards=records, outcomes=outcomes)


FIRST = batch(
    1,
    {"0:0": "trained", "0:1": "replaced:0:1r1", "0:1r1": "trained", "0:2": "dropped:overlong"},
    {"0:0": True, "0:1": False},
    {"0:1r1": True},
)
SECOND = batch(2, {"0:3": "trained", "0:4": "unscored:neutral"}, {"0:3": True, "0:4": False})


def test_every_prompt_ends_in_one_record():
    ledger = Ledger.of([FIRST, SECOND])
    assert ledger.counts() == {"trained": 3, "replaced": 1, "dropped": 1, "unscored": 1}
    assert ledger.trained() == ("0:0", "0:1r1", "0:3")
    assert ledger.records["0:4"] == Record(iteration=2, outcome="unscored:neutral")
    ledger.check_issued(["0:0", "0:1", "0:2", "0:3", "0:4"])


def test_a_lost_prompt_and_one_that_nobody_issued_are_found():
    ledger = Ledger.of([FIRST, SECOND])
    with pytest.raises(FatalError, match=r"no record of 1 issued prompts \(0:5\) and records of 0 .*\(none\)"):
        ledger.check_issued(["0:0", "0:1", "0:2", "0:3", "0:4", "0:5"])
    with pytest.raises(FatalError, match=r"records of 1 that were not issued \(0:4\)"):
        ledger.check_issued(["0:0", "0:1", "0:2", "0:3"])


def test_a_message_names_at_most_ten_of_many_lost_prompts():
    with pytest.raises(FatalError, match=r"no record of 11 issued prompts \(1:0, 1:1, 1:10, .*, 1:8, …\)"):
        Ledger.of([]).check_issued([f"1:{n}" for n in range(11)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([FIRST, batch(2, {"0:0": "trained"}, {"0:0": True})], "'0:0' ended in iteration 1 already"),
        ([batch(1, {"0:0": "trained"})], "recorded as trained, but is no valid sample"),
        ([batch(1, {"0:0": "trained"}, {"0:0": False})], "recorded as trained, but is no valid sample"),
        ([batch(1, {"0:0": "dropped:late"}, {"0:0": True})], "valid sample of its shards, but is not recorded"),
        ([batch(1, {}, {"0:0": True})], "valid sample of its shards, but is not recorded"),
        ([batch(1, {"0:0": "trained"}, {"0:0": True}, {"0:0": True})], "in its shards twice"),
        ([batch(1, {}, {"0:0": False})], "'0:0' is in its shards, but has no record"),
        ([batch(1, {"0:0": "replaced:0:0r1"}, {"0:0": False})], "replaced by '0:0r1', which has no record"),
        ([batch(1, {"0:0": "lost"})], "'lost', which is no outcome"),
        ([batch(1, {"0:0": "dropped"})], "'dropped', which is no outcome"),
        ([batch(1, {"0:0": "trained:twice"}, {"0:0": True})], "'trained:twice', which is no outcome"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_refused(batches, message):
    with pytest.raises(FatalError, match=message):
        Ledger.of(batches)
