import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from steadyhelm.data.types import FinishReason, ImageKey, Prompt, PromptId, Rewards, Trajectory
from steadyhelm.errors import CorruptObjectError, DataError
from steadyhelm.store.codec import (
    decode_reference,
    decode_rewards,
    decode_rollout,
    encode_reference,
    encode_rewards,
    encode_rollout,
)
from steadyhelm.testing.memory_store import MemoryStore

TEXT = st.text(max_size=30)
FLOATS = st.floats(width=32, allow_nan=True)
HASH = st.integers(0, 2**256 - 1).map(lambda n: f"images/{n:064x}")
IDS = st.one_of(st.integers(0, 255), st.integers(0, 511), st.integers(-(2**31), 2**31 - 1))


@st.composite
def trajectories(draw):
    num = draw(st.integers(0, 12))
    return arrays_of(draw, num)


def arrays_of(draw, num):
    ids = draw(st.sampled_from([st.integers(0, 255), st.integers(0, 65535), st.integers(-(2**31), 2**31 - 1)]))
    rows = np.int32, draw(st.integers(0, 9))
    versions = arrays(np.int32, rows[1], elements=draw(st.sampled_from([st.just(7), st.integers(-(2**31), 2**31 - 1)])))
    prompt = st.builds(
        Prompt,
        prompt_id=TEXT.map(PromptId),
        group_id=TEXT,
        text=TEXT,
        images=st.lists(draw(st.sampled_from([HASH, TEXT])).map(ImageKey), max_size=3).map(tuple),
        label=st.integers(-5, 2**40),
        swapped=st.booleans(),
        seed=st.integers(0, 2**63 - 1),
        pair_id=TEXT,
        trace=st.none() | TEXT,
        meta=st.dictionaries(TEXT, TEXT, max_size=2),
    )
    return draw(
        st.lists(
            st.builds(
                Trajectory,
                prompt=prompt,
                prompt_tokens=arrays(np.int32, st.integers(0, 6), elements=ids),
                tokens=arrays(*rows, elements=ids),
                logprobs=arrays(np.float32, rows[1], elements=FLOATS),
                versions=versions,
                attempt=st.integers(0, 300),
                finish=st.sampled_from(FinishReason),
                completion_text=TEXT,
            ),
            min_size=num,
            max_size=num,
        )
    )


def trajectory(number=0, *, tokens=(5, 6, 7), versions=(3, 3, 4), **changes):
    prompt = Prompt(
        prompt_id=PromptId(f"0:{number}"),
        group_id="0:1",
        text="Which digit is it?",
        images=(ImageKey("images/" + "9f" * 32),),
        label=2,
        swapped=True,
        seed=2**63 - 1 - number,
        meta={"form": "parity"},
    )
    made = {
        "prompt": prompt,
        "prompt_tokens": np.array([1, 2, 300], np.int32),
        "tokens": np.array(tokens, np.int32),
        "logprobs": -np.arange(len(tokens), dtype=np.float32),
        "versions": np.array(versions, np.int32),
        "attempt": 1,
        "finish": FinishReason.STOP,
        "completion_text": "<think>a</think><answer>1</answer>",
    }
    return Trajectory(**{**made, **changes})


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(b, np.ndarray):
                assert a.dtype == b.dtype
                assert a.tobytes() == b.tobytes()
                assert not a.flags.writeable
            else:
                assert a == b


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(trajectories())
def test_any_trajectories_come_back_bit_for_bit(rows):
    shard = decode_rollout(b"".join(encode_rollout(rows)))
    assert_same(shard, rows)
    for number, row in enumerate(rows):
        part = slice(shard.offsets[number], shard.offsets[number + 1])
        assert shard.tokens[part].tobytes() == row.tokens.tobytes()
        assert shard.logprobs[part].tobytes() == row.logprobs.tobytes()
        assert shard.versions[part].tobytes() == row.versions.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(arrays(np.float32, st.integers(0, 9), elements=FLOATS), max_size=8))
def test_any_reference_log_probs_come_back_bit_for_bit(rows):
    found = decode_reference(b"".join(encode_reference(rows)))
    assert [row.tobytes() for row in found] == [row.tobytes() for row in rows]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.lists(TEXT, unique=True, max_size=4), st.data())
def test_any_rewards_come_back_bit_for_bit(num, names, data):
    column = arrays(np.float32, num, elements=FLOATS)
    rewards = Rewards(
        total=data.draw(column),
        valid=data.draw(arrays(np.bool_, num)),
        components={name: data.draw(column) for name in names},
        detail=tuple(data.draw(st.lists(st.dictionaries(TEXT, TEXT | st.integers()), min_size=num, max_size=num))),
    )
    found = decode_rewards(b"".join(encode_rewards(rewards)))
    assert found.total.tobytes() == rewards.total.tobytes()
    assert found.valid.tolist() == rewards.valid.tolist()
    assert {k: v.tobytes() for k, v in found.components.items()} == {
        k: v.tobytes() for k, v in rewards.components.items()
    }
    assert found.detail == rewards.detail


def shards():
    rewards = Rewards(
        total=np.array([1.5, np.nan], np.float32),
        valid=np.array([True, False]),
        components={"format": np.array([1, 0], np.float32)},
        detail=({"answer": 1}, {"error": "late"}),
    )
    return {
        "rollout": (decode_rollout, b"".join(encode_rollout([trajectory(0), trajectory(1)]))),
        "reward": (decode_rewards, b"".join(encode_rewards(rewards))),
        "reference": (decode_reference, b"".join(encode_reference([np.zeros(3, np.float32)]))),
    }


@pytest.mark.parametrize("kind", ["rollout", "reward", "reference"])
def test_every_truncation_is_found(kind):
    decode, data = shards()[kind]
    decode(data)
    for cut in range(len(data)):
        with pytest.raises(CorruptObjectError, match=rf"run/x is no whole {kind} shard"):
            decode(data[:cut], "run/x")
    with pytest.raises(CorruptObjectError):
        decode(data + bytes(8), "run/x")


@pytest.mark.parametrize("kind", ["rollout", "reward", "reference"])
def test_every_flipped_bit_is_found_by_the_reference(kind):
    _, data = shards()[kind]
    store = MemoryStore()
    ref = store.put("run/x", data)
    for bit in range(0, 8 * len(data), 3):
        store.damage("run/x", flip_bit=bit)
        with pytest.raises(CorruptObjectError):
            store.read(ref)
        store.damage("run/x", flip_bit=bit)
    store.read(ref)


def test_damage_that_nobody_checksummed_raises_nothing_but_corrupt_object_errors():
    rng = np.random.default_rng(0)
    found = 0
    for decode, data in shards().values():
        for _ in range(600):
            damaged = bytearray(data)
            for place in rng.integers(len(data), size=3):
                damaged[place] = rng.integers(256)
            try:
                rows = decode(bytes(damaged))
                list(rows) if decode is decode_rollout else None
            except CorruptObjectError:
                found += 1
    assert found > 300


def test_another_kind_of_shard_and_garbage_are_refused():
    decode, _ = shards()["rollout"]
    with pytest.raises(CorruptObjectError, match="kind 'reward'"):
        decode(shards()["reward"][1])
    for garbage in (b"", b"garbage", bytes(1000), b"PK\x03\x04" + bytes(100)):
        with pytest.raises(CorruptObjectError):
            decode(garbage)


def test_wide_ids_and_log_probs_are_views_and_narrow_ids_take_two_bytes():
    wide = b"".join(encode_rollout([trajectory(tokens=(5, 152_000, 7))]))
    shard = decode_rollout(wide)
    buffer = np.frombuffer(wide, np.uint8)
    assert np.shares_memory(shard.tokens, buffer)
    assert np.shares_memory(shard.logprobs, buffer)
    assert np.shares_memory(shard[0].logprobs, buffer)
    narrow = b"".join(encode_rollout([trajectory(tokens=[300] * 8000, versions=[1] * 8000)]))
    bare = b"".join(encode_rollout([trajectory(tokens=[300] * 4000, versions=[1] * 4000)]))
    assert len(narrow) - len(bare) == 4000 * (2 + 4)
    assert decode_rollout(narrow).tokens.dtype == np.int32


def test_what_repeats_is_written_once():
    long = np.arange(5000, dtype=np.int32)
    one = sum(part.nbytes for part in encode_rollout([trajectory(0, prompt_tokens=long)]))
    many = sum(part.nbytes for part in encode_rollout([trajectory(n, prompt_tokens=long) for n in range(8)]))
    assert many - one < 1000


def test_parts_join_to_the_same_bytes_whatever_their_size():
    rows = [
        trajectory(n, completion_text="x" * 10_000, prompt_tokens=np.full(9000, 70_000 + n, np.int32)) for n in (0, 1)
    ]
    assert_same(decode_rollout(b"".join(encode_rollout(rows))), rows)
    parts = [np.frombuffer(part, np.uint8) for part in encode_rollout(rows)]
    assert all(any(np.shares_memory(part, row.prompt_tokens) for part in parts) for row in rows)


def test_a_trajectory_with_unequal_columns_is_refused():
    with pytest.raises(DataError, match=r"prompt 0:4 has 3 tokens, 2 log-probs and 3 versions"):
        encode_rollout([trajectory(4, logprobs=np.zeros(2, np.float32))])
    with pytest.raises(DataError, match="rewards of 2 samples"):
        encode_rewards(Rewards(total=np.zeros(2, np.float32), valid=np.ones(1, np.bool_), components={}, detail=()))


def test_a_shard_is_a_sequence():
    rows = [trajectory(n) for n in range(5)]
    shard = decode_rollout(b"".join(encode_rollout(rows)))
    assert [row.prompt.prompt_id for row in shard[1:3]] == ["0:1", "0:2"]
    assert shard[-1].prompt.seed == 2**63 - 5
    assert shard.lengths.tolist() == [3] * 5
    assert shard.versions.tolist() == [3, 3, 4] * 5
    assert len(decode_rollout(b"".join(encode_rollout([])))) == 0


def test_the_header_is_json_that_other_tools_can_read():
    data = b"".join(encode_reference([np.zeros(3, np.float32)]))
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + length])
    assert header == {"kind": "reference", "facts": {}, "columns": [["lengths", "<u1", 1], ["logprobs", "<f4", 3]]}
