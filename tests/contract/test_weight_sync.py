"""What every way of moving weights promises; a new one joins with a name in ``WAYS``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from steadyhelm.errors import CorruptObjectError, ObjectMissingError
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights import WeightSync, local
from steadyhelm.weights.broadcast import BroadcastWeights
from steadyhelm.weights.layout import Layout
from steadyhelm.weights.local import LocalWeights
from steadyhelm.weights.share import Share
from steadyhelm.weights.store import StoreWeights

from tests.unit.weights.versions import Ranks, key, large_set, same_bits, small_set, stepped, version

WAYS: dict[str, Callable[[MemoryStore, Share | None], WeightSync]] = {
    "anchors": lambda store, share: StoreWeights(store, anchor_every=1, share=share),
    "deltas": lambda store, share: StoreWeights(store, anchor_every=4, share=share),
    "shared memory": lambda store, share: LocalWeights(store, share=share),
    "broadcast": lambda store, share: BroadcastWeights(store, share=share),
}


@dataclass
class Way:
    """One way, over one store."""

    store: MemoryStore
    make: Callable[[MemoryStore, Share | None], WeightSync]

    def end(self, share: Share | None = None) -> WeightSync:
        """A publisher or a reader of its own, as another process has one."""
        return self.make(self.store, share)


@pytest.fixture(params=sorted(WAYS))
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
    monkeypatch.setattr(local, "memory_folder", lambda num_bytes: tmp_path)
    monkeypatch.setattr(local, "FOLDERS", (tmp_path,))
    return Way(MemoryStore(), WAYS[request.param])


def test_each_version_arrives_bit_for_bit_at_whoever_followed_and_at_whoever_comes_late(way):
    publisher, follower, tensors = way.end(), way.end(), small_set()
    for iteration in range(7):
        record = publisher.publish(version(iteration), key(version(iteration)), tensors)
        assert record.version == version(iteration)
        same_bits(follower.fetch(record), tensors)
        same_bits(way.end().fetch(record), tensors)
        tensors = stepped(tensors, iteration)
    publisher.close()


def test_what_a_version_holds_is_what_was_published_not_what_became_of_it(way):
    publisher, tensors = way.end(), small_set()
    record = publisher.publish(version(0), key(version(0)), tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    same_bits(way.end().fetch(record), expected)
    publisher.close()


def test_ranks_that_publish_a_part_each_agree_on_one_record(way):
    tensors = large_set()
    ranks = Ranks(Layout.of(tensors), 3, way.end)
    for iteration in range(2):
        records = ranks.publish(version(iteration), tensors)
        assert all(record == records[0] for record in records)
        same_bits(way.end().fetch(records[0]), tensors)
        tensors = stepped(tensors, iteration)
    for rank in ranks.publishers:
        rank.close()


def test_another_attempt_at_an_iteration_does_not_disturb_the_first_ones_record(way):
    first, second = way.end(), way.end()
    one, two = small_set(), small_set(seed=1)
    records = [
        first.publish(version(3, 1), key(version(3, 1)), one),
        second.publish(version(3, 2), key(version(3, 2)), two),
    ]
    same_bits(way.end().fetch(records[0]), one)
    same_bits(way.end().fetch(records[1]), two)
    first.close(), second.close()


def test_a_record_with_another_checksum_is_refused_and_the_true_one_still_comes(way):
    publisher, reader, tensors = way.end(), way.end(), small_set()
    record = publisher.publish(version(0), key(version(0)), tensors)
    with pytest.raises(CorruptObjectError, match="their record says 0000"):
        reader.fetch(replace(record, checksum="0" * 32))
    same_bits(reader.fetch(record), tensors)
    publisher.close()


def test_weights_whose_objects_are_gone_are_missing(way):
    publisher = way.end()
    record = publisher.publish(version(0), key(version(0)), small_set())
    for ref in record.objects:
        way.store.delete(ref.key)
    with pytest.raises(ObjectMissingError):
        way.end().fetch(record)
    publisher.close()


def test_a_publisher_told_of_the_same_weights_answers_with_a_record_of_them(way):
    publisher, tensors = way.end(), small_set()
    known = publisher.publish(version(0), key(version(0)), tensors)
    record = publisher.publish(version(0, 2), key(version(0, 2)), tensors, known)
    assert record.checksum == known.checksum
    same_bits(way.end().fetch(record), tensors)
    changed = publisher.publish(version(1, 2), key(version(1, 2)), stepped(tensors, 0), known)
    assert changed.version == version(1, 2)
    publisher.close()


def test_nothing_of_a_closed_publisher_keeps_a_new_one_from_publishing_the_version_again(way):
    tensors = {"weight": torch.randn(5000)}
    first = way.end()
    first.publish(version(0), key(version(0)), tensors)
    first.close()
    again = way.end()
    same_bits(way.end().fetch(again.publish(version(0), key(version(0)), tensors)), tensors)
    again.close()
