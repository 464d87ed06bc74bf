"""What the learner reads and prepares before its batch is committed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from steadyhelm.data.types import (
    BatchManifest,
    FinishReason,
    ImageKey,
    PolicyVersion,
    Prompt,
    PromptId,
    Rewards,
    ShardRecord,
    Trajectory,
)
from steadyhelm.errors import CorruptObjectError, ObjectMissingError
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.services.learner.ahead import ShardsAhead
from steadyhelm.services.learner.batch import read_batch
from steadyhelm.store.codec import encode_rewards, encode_rollout
from steadyhelm.store.images import get_image, put_image
from steadyhelm.testing.memory_store import MemoryStore

from tests.unit.models.pictures import picture


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def encoder(tiny_model: Path, store: MemoryStore) -> PromptEncoder:
    return PromptEncoder(tiny_model, min_pixels=3136, max_pixels=100352, fetch=lambda key: get_image(store, key))


MakeAhead = Callable[..., ShardsAhead]


@pytest.fixture
def make(store: MemoryStore, encoder: PromptEncoder) -> MakeAhead:
    return lambda **settings: ShardsAhead(store, encoder, **{"gives_way": True, **settings})


def image(store: MemoryStore, number: int) -> ImageKey:
    return put_image(store, picture(number, 56, 56))


def shard(store: MemoryStore, number: int, images: tuple[ImageKey, ...] = (), seed: int = 1) -> ShardRecord:
    """A scored shard of two trajectories."""
    rows = [
        Trajectory(
            prompt=Prompt(
                prompt_id=PromptId(f"0:{number}{n}"),
                group_id=f"0:{number}",
                text="",
                images=images,
                label=1,
                swapped=False,
                seed=seed,
            ),
            prompt_tokens=np.arange(3, dtype=np.int32),
            tokens=np.arange(2 + n, dtype=np.int32),
            logprobs=np.full(2 + n, -0.5, np.float32),
            versions=np.full(2 + n, 4, np.int32),
            attempt=1,
            finish=FinishReason.STOP,
            completion_text="",
        )
        for n in range(2)
    ]
    total = np.array([1.0, 0.5], np.float32)
    rewards = Rewards(total=total, valid=np.ones(2, np.bool_), components={}, detail=({}, {}))
    return ShardRecord(
        shard=number,
        rollout=store.put(f"r/{number}.rollout", encode_rollout(rows)),
        prompt_ids=tuple(row.prompt.prompt_id for row in rows),
        num_tokens=5,
        min_version=4,
        max_version=4,
        attempt=1,
        reward=store.put(f"r/{number}.reward", encode_rewards(rewards)),
    )


def manifest(*shards: ShardRecord) -> BatchManifest:
    return BatchManifest(iteration=5, policy=PolicyVersion(iteration=4, attempt=1), shards=shards, outcomes={})


def test_what_was_fetched_is_not_read_again_and_is_the_same_batch(store: MemoryStore, make: MakeAhead) -> None:
    shards = [shard(store, 0), shard(store, 1)]
    plain = read_batch(store, manifest(*shards), with_rewards=True, with_reference=False)
    ahead = make()
    for told in shards:
        ahead.fetch(5, replace(told, reward=None))
        ahead.fetch(5, told)
    for told in shards:
        store.delete(told.rollout.key)
    with ahead.training(5):
        found = read_batch(ahead, manifest(*shards), with_rewards=True, with_reference=False)
    assert ahead.share == 1.0
    assert ahead.num_bytes == 0
    assert [row.prompt.prompt_id for row in found.trajectories] == [row.prompt.prompt_id for row in plain.trajectories]
    assert found.rewards.equal(plain.rewards)
    assert found.behaviour.equal(plain.behaviour)


def test_a_shard_that_nobody_told_of_is_read_when_it_is_needed(store: MemoryStore, make: MakeAhead) -> None:
    known, other = shard(store, 0), shard(store, 1)
    ahead = make()
    ahead.fetch(5, known)
    with ahead.training(5):
        found = read_batch(ahead, manifest(known, other), with_rewards=True, with_reference=False)
    assert len(found) == 4
    assert 0.4 < ahead.share < 0.6


def test_what_the_manifest_does_not_name_is_never_used_and_goes_with_its_batch(
    store: MemoryStore, make: MakeAhead
) -> None:
    ahead = make()
    dropped, before = shard(store, 0), shard(store, 1, seed=7)
    ahead.fetch(5, dropped)
    ahead.fetch(5, before)
    again = shard(store, 1, seed=8)  # the same key, other bytes
    with ahead.training(5):
        found = read_batch(ahead, manifest(again), with_rewards=True, with_reference=False)
        assert ahead.num_bytes > 0
    assert {row.prompt.seed for row in found.trajectories} == {8}
    assert ahead.num_bytes == 0


def test_what_comes_too_late_is_not_kept(store: MemoryStore, make: MakeAhead) -> None:
    ahead = make()
    late, next_one = shard(store, 0), shard(store, 1)
    with ahead.training(5):
        ahead.fetch(5, late)
        assert ahead.num_bytes == 0
        ahead.fetch(6, next_one)
    ahead.fetch(5, late)
    assert next_one.reward is not None
    assert ahead.num_bytes == next_one.rollout.num_bytes + next_one.reward.num_bytes


def test_objects_stay_within_their_bound(store: MemoryStore, make: MakeAhead) -> None:
    first, second = shard(store, 0), shard(store, 1)
    assert first.reward is not None
    ahead = make(max_bytes=first.rollout.num_bytes + first.reward.num_bytes)
    ahead.fetch(5, first)
    ahead.fetch(5, second)
    assert ahead.num_bytes == first.rollout.num_bytes + first.reward.num_bytes


def test_a_shard_that_cannot_be_read_is_told_of_where_it_is_needed(store: MemoryStore, make: MakeAhead) -> None:
    gone, broken, without_image = shard(store, 0), shard(store, 1), shard(store, 2, (ImageKey("images/" + "0" * 64),))
    store.delete(gone.rollout.key)
    store.damage(broken.rollout.key, flip_bit=5)
    ahead = make()
    for told in (gone, broken, without_image):
        ahead.fetch(5, told)
    with ahead.training(5):
        with pytest.raises(ObjectMissingError):
            ahead.read(gone.rollout)
        with pytest.raises(CorruptObjectError):
            ahead.read(broken.rollout)
        assert ahead.read(without_image.rollout) == store.read(without_image.rollout)


def test_images_are_prepared_ahead_up_to_their_bound(
    store: MemoryStore, make: MakeAhead, encoder: PromptEncoder
) -> None:
    keys = tuple(image(store, n) for n in range(6))
    ahead = make()
    ahead.fetch(5, shard(store, 0, keys[:3]))
    assert encoder.keeps(keys[:3])
    bounded = make(max_image_bytes=1)
    bounded.fetch(5, shard(store, 1, keys[3:]))
    bounded.fetch(5, shard(store, 2, (image(store, 9),)))
    assert not encoder.keeps((image(store, 9),))


@pytest.mark.parametrize("gives_way", [True, False])
def test_images_of_later_batches_wait_for_the_step_where_both_want_the_cores(
    store: MemoryStore, make: MakeAhead, encoder: PromptEncoder, gives_way: bool
) -> None:
    ahead, key = make(gives_way=gives_way), image(store, 1)
    told = shard(store, 0, (key,))
    with ThreadPoolExecutor(1) as thread:
        with ahead.training(5):
            fetching = thread.submit(ahead.fetch, 6, told)
            if gives_way:
                with pytest.raises(TimeoutError):
                    fetching.result(0.2)
                assert not encoder.keeps((key,))
            else:
                fetching.result(30)
        fetching.result(30)
    assert encoder.keeps((key,))


def test_closing_ends_what_waits(store: MemoryStore, make: MakeAhead, encoder: PromptEncoder) -> None:
    ahead, key = make(), image(store, 1)
    with ThreadPoolExecutor(1) as thread, ahead.training(5):
        fetching = thread.submit(ahead.fetch, 6, shard(store, 0, (key,)))
        ahead.close()
        fetching.result(30)
    assert not encoder.keeps((key,))
