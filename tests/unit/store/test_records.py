import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steadyhelm.data.types import (
    BatchManifest,
    CheckpointRecord,
    ObjectRef,
    PolicyVersion,
    Sampling,
    ShardRecord,
    WeightsRecord,
)
from steadyhelm.errors import CorruptObjectError
from steadyhelm.store.records import dumps, from_json, loads, object_refs, to_json

REF = ObjectRef(key="run/batches/000001/1-0000.rollout", num_bytes=7, xxh3="0" * 32)
SHARD = ShardRecord(
    shard=0,
    rollout=REF,
    prompt_ids=("0:1", "0:2"),
    num_tokens=9,
    min_version=0,
    max_version=1,
    attempt=1,
    reward=ObjectRef(key="r", num_bytes=1, xxh3="1"),
    valid=(True, False),
)
MANIFEST = BatchManifest(
    iteration=1,
    policy=PolicyVersion(iteration=0, attempt=1),
    shards=(SHARD,),
    outcomes={"0:1": "trained", "0:2": "unscored:neutral"},
)


def again(record):
    return from_json(type(record), json.loads(dumps(to_json(record))), "a test")


@pytest.mark.parametrize(
    "record",
    [
        MANIFEST,
        REF,
        WeightsRecord(version=PolicyVersion(iteration=1, attempt=2), objects=(REF, REF), checksum="c"),
        WeightsRecord(
            version=PolicyVersion(iteration=1, attempt=2),
            objects=(),
            checksum="c",
            base=PolicyVersion(iteration=0, attempt=1),
        ),
        CheckpointRecord(version=PolicyVersion(iteration=3, attempt=1), objects=(REF,)),
        Sampling(max_new_tokens=3, temperature=1.0),
        Sampling(max_new_tokens=3, temperature=float("-inf")),
    ],
)
def test_a_record_comes_back_equal(record):
    assert again(record) == record


@settings(max_examples=50, deadline=None)
@given(st.builds(ShardRecord))
def test_any_shard_record_comes_back_equal(record):
    assert again(record) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"unknown \['extra'\]"),
        ({"policy": {"iteration": 0}}, r"a test.policy is no PolicyVersion: missing \['attempt'\]"),
        ({"iteration": "1"}, "a test.iteration is '1' where a int belongs"),
        ({"iteration": True}, "a test.iteration is 'True' where a int belongs"),
        ({"shards": {}}, "a test.shards is '{}' where a tuple belongs"),
        ({"shards": [None]}, r"a test.shards\[0\] is 'None' where a ShardRecord belongs"),
        ({"outcomes": {"0:1": 3}}, "a test.outcomes.0:1 is '3' where a str belongs"),
        ({"policy": None}, "a test.policy is 'None' where a PolicyVersion belongs"),
    ],
)
def test_a_changed_record_is_refused_with_its_place(change, message):
    with pytest.raises(CorruptObjectError, match=message):
        from_json(BatchManifest, {**to_json(MANIFEST), **change}, "a test")


def test_a_record_from_before_a_field_with_a_default_is_read_as_that_default():
    old = to_json(MANIFEST)
    assert old["shards"][0].pop("oldest") == []
    assert from_json(BatchManifest, old, "a test") == MANIFEST


def test_the_objects_of_a_record_are_all_named():
    assert [ref.key for ref in object_refs(MANIFEST)] == ["run/batches/000001/1-0000.rollout", "r"]
    assert object_refs(CheckpointRecord(version=PolicyVersion(iteration=3, attempt=1), objects=(REF,))) == (REF,)


def test_what_is_no_json_object_is_corrupt():
    for data in (b"", b"[1]", b'{"a":', b"\xff", b"[" * 100_000):
        with pytest.raises(CorruptObjectError, match="entry 3"):
            loads(data, "entry 3")
    assert to_json(Sampling(max_new_tokens=3, temperature=float("nan")))["temperature"] == "nan"
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"a": float("nan")})
    with pytest.raises(TypeError, match="not a record"):
        to_json({"a": 1})
