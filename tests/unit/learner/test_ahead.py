"""What the learner reads and prepares before its batch is committed."""

from collections.abc import Callable
from concurrent.futures import Future, wait
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
from steadyhelm.errors import CorruptObjectError, FatalError, ObjectMissingError
from steadyhelm.models.encoder import PromptEncoder
from steadyhelm.services import Coming
from steadyhelm.services.learner.ahead import BatchesAhead
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


MakeAhead = Callable[..., BatchesAhead]


@pytest.fixture
def make(store: MemoryStore, encoder: PromptEncoder) -> MakeAhead:
    return lambda **settings: BatchesAhead(store, encoder, **{"gives_way": True, **settings})


def image(store: MemoryStore, number: int) -> ImageKey:
    return put_image(store, picture(number, 56, 56))


def shard(store: MemoryStore, number: int, seed: int = 1) -> ShardRecord:
    """A scored shard of two trajectories."""
    rows = [
        Trajectory(
            prompt=Prompt(
                prompt_id=PromptId(f"0:{number}{n}"),
                group_id=f"0:{number}",
                text="",
                images=(),
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


def told(ahead: BatchesAhead, iteration: int, *shards: ShardRecord, images: tuple[ImageKey, ...] = ()) -> None:
    """Tells of shards and images, and waits until they are read and prepared."""
    refs = tuple(ref for entry in shards for ref in (entry.rollout, entry.reward) if ref is not None)
    settled(ahead.expect(Coming(iteration=iteration, objects=refs, images=images)))


def settled(work: tuple[Future[None], ...]) -> None:
    assert not wait(work, 30).not_done


def size(*shards: ShardRecord) -> int:
    return sum(entry.rollout.num_bytes + (entry.reward.num_bytes if entry.reward else 0) for entry in shards)


def test_what_was_read_ahead_is_not_read_again_and_is_the_same_batch(store: MemoryStore, make: MakeAhead) -> None:
    shards = [shard(store, 0), shard(store, 1)]
    plain = read_batch(store, manifest(*shards), with_rewards=True, with_reference=False)
    ahead = make()
    told(ahead, 5, *shards)
    for entry in shards:
        store.delete(entry.rollout.key)
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
    told(ahead, 5, known)
    with ahead.training(5):
        found = read_batch(ahead, manifest(known, other), with_rewards=True, with_reference=False)
    assert len(found) == 4
    assert ahead.share == 0.5


def test_what_the_manifest_does_not_name_is_never_used_and_goes_with_its_batch(
    store: MemoryStore, make: MakeAhead
) -> None:
    ahead = make()
    told(ahead, 5, shard(store, 0), shard(store, 1, seed=7))
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
        told(ahead, 5, late)
        assert ahead.num_bytes == 0
        told(ahead, 6, next_one)
    told(ahead, 5, late)
    assert ahead.num_bytes == size(next_one)


def test_objects_stay_within_their_bound(store: MemoryStore, make: MakeAhead) -> None:
    first, second = shard(store, 0), shard(store, 1)
    ahead = make(max_bytes=size(first))
    told(ahead, 5, first)
    told(ahead, 5, second)
    assert ahead.num_bytes == size(first)


def test_what_cannot_be_read_or_prepared_is_told_of_where_it_is_needed(
    store: MemoryStore, make: MakeAhead, encoder: PromptEncoder
) -> None:
    gone, broken, other = shard(store, 0), shard(store, 1), shard(store, 2)
    store.delete(gone.rollout.key)
    store.damage(broken.rollout.key, flip_bit=5)
    ahead, missing = make(), ImageKey("images/" + "0" * 64)
    told(ahead, 5, gone, broken, other, images=(missing,))
    with ahead.training(5):
        with pytest.raises(ObjectMissingError):
            ahead.read(gone.rollout)
        with pytest.raises(CorruptObjectError):
            ahead.read(broken.rollout)
        assert ahead.read(other.rollout) == store.read(other.rollout)
        with pytest.raises(ObjectMissingError):
            encoder.keep((missing,))


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_what_fails_in_passing_ahead_of_time_is_read_when_it_is_needed(
    store: MemoryStore, make: MakeAhead, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ahead, known = make(), shard(store, 0)

    def fail(_: object) -> memoryview:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store, "read", fail)
        told(ahead, 5, known)
    with ahead.training(5):
        assert ahead.read(known.rollout) == store.read(known.rollout)


def test_an_image_waits_for_a_step_no_longer_than_one_may_take(
    store: MemoryStore, make: MakeAhead, encoder: PromptEncoder
) -> None:
    ahead, key = make(wait_s=0.01), image(store, 1)
    with ahead.training(5):
        told(ahead, 6, images=(key,))
        assert not encoder.keeps((key,))


def test_an_error_of_ours_in_the_work_ahead_ends_the_next_step(store: MemoryStore, make: MakeAhead) -> None:
    ahead, known = make(), shard(store, 0)
    told(ahead, 5, images=(None,))
    with ahead.training(5), pytest.raises(FatalError, match="preparing a batch ahead failed, report it: TypeError"):
        ahead.read(known.rollout)


def test_images_are_prepared_ahead_up_to_their_bound(
    store: MemoryStore, make: MakeAhead, encoder: PromptEncoder
) -> None:
    keys = tuple(image(store, n) for n in range(6))
    told(make(), 5, images=keys[:3])
    assert encoder.keeps(keys[:3])
    bounded = make(max_image_bytes=1)
    told(bounded, 5, images=keys[3:4])
    told(bounded, 5, images=keys[4:5])
    told(bounded, 6, images=keys[5:])
    assert encoder.keeps(keys[3:4] + keys[5:])
    assert not encoder.keeps(keys[4:5])


@pytest.mark.parametrize("gives_way", [True, False])
def test_images_of_later_batches_wait_for_the_step_where_both_want_the_cores(
    store: MemoryStore, make: MakeAhead, encoder: PromptEncoder, gives_way: bool
) -> None:
    ahead, key = make(gives_way=gives_way), image(store, 1)
    with ahead.training(5):
        work = ahead.expect(Coming(iteration=6, images=(key,)))
        if gives_way:
            assert wait(work, 0.2).not_done
            assert not encoder.keeps((key,))
        else:
            settled(work)
    settled(work)
    assert encoder.keeps((key,))


def test_closing_ends_what_waits_and_begins_nothing_more(
    store: MemoryStore, make: MakeAhead, encoder: PromptEncoder
) -> None:
    ahead, key = make(), image(store, 1)
    with ahead.training(5):
        work = ahead.expect(Coming(iteration=6, images=(key,) * 9))
        ahead.close()
        settled(tuple(one for one in work if not one.cancelled()))
    assert ahead.expect(Coming(iteration=7, images=(key,))) == ()
    assert not encoder.keeps((key,))
