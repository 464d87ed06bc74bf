"""Deltas through the object store: chains, newcomers, gaps, shares, and what is refused."""

from dataclasses import replace

import pytest
import torch
from steadyhelm.errors import CorruptObjectError, ObjectMissingError, StoreError
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights.delta import Delta
from steadyhelm.weights.layout import Layout
from steadyhelm.weights.store import StoreWeights

from tests.unit.weights.versions import Ranks, copied, key, large_set, same_bits, small_set, stepped, version


class Run:
    """Versions 0, 1, … of a small set, published one after the other."""

    def __init__(self, count, anchor_every=20, threads=1):
        self.store = MemoryStore()
        self.publisher = StoreWeights(self.store, anchor_every=anchor_every, threads=threads)
        self.tensors, self.records = [], []
        for iteration in range(count):
            self.tensors.append(stepped(self.tensors[-1], iteration) if iteration else small_set())
            self.publish(iteration)

    def publish(self, iteration, attempt=1):
        of = version(iteration, attempt)
        given = copied(self.tensors[iteration])
        self.records[iteration:] = [self.publisher.publish(of, key(of), given)]
        same_bits(given, self.tensors[iteration])
        return self.records[iteration]


def test_a_chain_of_fifty_versions_comes_back_bit_for_bit_at_every_step():
    run = Run(51, anchor_every=17)
    reader = StoreWeights(run.store, threads=2)
    for tensors, record in zip(run.tensors, run.records, strict=True):
        same_bits(reader.fetch(record), tensors)
    anchors = [record.version.iteration for record in run.records if record.base is None]
    assert anchors == [0, 17, 34]
    assert all(record.base in (None, version(record.version.iteration - 1)) for record in run.records)


@pytest.mark.parametrize("iteration", [0, 4, 5, 9])
def test_a_newcomer_takes_the_last_anchor_and_the_deltas_behind_it(iteration):
    run = Run(10, anchor_every=5)
    for record in run.records[: iteration - iteration % 5]:
        run.store.delete(record.objects[0].key)
    same_bits(StoreWeights(run.store).fetch(run.records[iteration]), run.tensors[iteration])


def test_only_the_deltas_on_the_way_are_read():
    run = Run(8)
    reader = StoreWeights(run.store)
    reader.fetch(run.records[5])
    for record in run.records[:6]:
        run.store.delete(record.objects[0].key)
    same_bits(reader.fetch(run.records[7]), run.tensors[7])
    same_bits(reader.fetch(run.records[7]), run.tensors[7])


def test_a_gap_and_a_way_back_are_bridged_from_an_anchor():
    run = Run(12, anchor_every=4)
    reader = StoreWeights(run.store)
    for iteration in (2, 9, 6, 5, 11, 0):
        same_bits(reader.fetch(run.records[iteration]), run.tensors[iteration])


def test_a_reader_whose_copy_was_changed_finds_out_and_starts_from_the_anchor():
    run = Run(4)
    reader = StoreWeights(run.store)
    reader.fetch(run.records[2])["embed"].view(torch.int16)[3, 3] ^= 1
    same_bits(reader.fetch(run.records[3]), run.tensors[3])


def test_a_lost_delta_is_missed_and_the_reader_goes_on_from_what_it_has():
    run = Run(6)
    reader = StoreWeights(run.store)
    reader.fetch(run.records[2])
    run.store.delete(run.records[4].objects[0].key)
    with pytest.raises(ObjectMissingError, match=r"000004\.1/delta-0000"):
        reader.fetch(run.records[5])
    run.store.delete(run.records[0].objects[0].key)
    same_bits(reader.fetch(run.records[3]), run.tensors[3])


def test_an_unchanged_version_is_a_delta_of_next_to_nothing():
    run = Run(1)
    run.tensors.append(run.tensors[0])
    record = run.publish(1)
    assert record.base == version(0)
    assert record.checksum == run.records[0].checksum
    assert sum(ref.num_bytes for ref in record.objects) < 1500


def test_a_delta_of_few_changes_is_small_beside_its_anchor():
    run = Run(1)
    run.tensors.append(copied(run.tensors[0]))
    run.tensors[1]["embed"][5, :9] *= 1.01
    anchor, delta = run.records[0], run.publish(1)
    assert sum(ref.num_bytes for ref in delta.objects) < 0.2 * sum(ref.num_bytes for ref in anchor.objects)
    same_bits(StoreWeights(run.store).fetch(delta), run.tensors[1])


def test_which_columns_change_does_not_matter_to_the_size_of_a_delta():
    generator = torch.Generator().manual_seed(3)
    masters = {f"layer{n}": torch.randn(1024, 1024, generator=generator) * 0.02 for n in range(8)}
    steps = {name: 1e-6 * torch.randn(1024, 256, generator=generator) for name in masters}
    sizes = []
    for first in (0, 256, 512):
        publisher = StoreWeights(MemoryStore())
        publisher.publish(version(0), key(version(0)), {name: tensor.bfloat16() for name, tensor in masters.items()})
        for name, tensor in masters.items():
            tensor[:, first : first + 256] += steps[name]
        record = publisher.publish(version(1), key(version(1)), {n: tensor.bfloat16() for n, tensor in masters.items()})
        sizes.append(sum(ref.num_bytes for ref in record.objects))
    assert max(sizes) < 1.05 * min(sizes)


def damaged(store, ref, damage):
    """The object's reference after ``damage`` to it, which knows the new checksum: a fault that no store can see."""
    return store.put(ref.key, damage(bytes(store.get(ref.key))))


DAMAGES = {
    "truncated": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "a bit flipped in the header": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "a bit flipped in the codes": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "an anchor instead": lambda data: b"\x08\0\0\0\0\0\0\0{}      ",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_delta_is_refused_and_nothing_of_it_applied(damage):
    run = Run(4)
    reader = StoreWeights(run.store)
    reader.fetch(run.records[1])
    ref = damaged(run.store, run.records[2].objects[0], damage)
    with pytest.raises(CorruptObjectError, match=r"000002\.1/delta-0000 is"):
        reader.fetch(replace(run.records[2], objects=(ref,)))
    same_bits(reader.fetch(run.records[1]), run.tensors[1])


def test_an_object_of_another_version_base_run_or_number_of_parts_is_refused():
    run, other = Run(4), Run(4)
    other.tensors[1]["layer.bias"][0] = 7.0
    other.publish(1)
    foreign = run.store.put("run/foreign", bytes(other.store.get(other.records[1].objects[0].key)))
    reader = StoreWeights(run.store)
    reader.fetch(run.records[1])
    swaps = [
        run.records[1].objects,  # replayed: the version before
        run.records[3].objects,  # swapped with the version after
        run.records[0].objects,
        (foreign,),
        (),
        (*run.records[2].objects, *run.records[2].objects),
    ]
    for objects in swaps:
        with pytest.raises(CorruptObjectError, match=r"delta to 1\.1|is not a weight delta"):
            reader.fetch(replace(run.records[2], objects=objects))
    with pytest.raises(CorruptObjectError, match=r"delta to 0\.1"):
        reader.fetch(replace(run.records[2], base=version(0)))
    same_bits(reader.fetch(run.records[2]), run.tensors[2])


@pytest.mark.parametrize("field", ["codes", "layout", "checksum", "base"])
def test_a_forged_delta_fails_the_check_of_the_whole_set_at_the_latest(field):
    run = Run(3)
    ref = run.records[2].objects[0]
    honest = Delta.from_bytes(run.store.get(ref.key), ref.key)
    forged = {
        "codes": honest.codes[::-1],
        "layout": "0" * 32,
        "checksum": "0" * 32,
        "base": run.records[2],
    }
    false = run.store.put(ref.key, replace(honest, **{field: forged[field]}).to_bytes())
    with pytest.raises(CorruptObjectError):
        StoreWeights(run.store).fetch(replace(run.records[2], objects=(false,)))


def test_a_delta_of_a_later_format_names_the_remedy():
    run = Run(2)
    ref = run.records[1].objects[0]
    data = bytes(run.store.get(ref.key)).replace(b'"format":2', b'"format":3')
    import xxhash

    later = run.store.put(ref.key, data[:-16] + xxhash.xxh3_128_digest(data[:-16]))
    with pytest.raises(StoreError, match="use the version of Steadyhelm that wrote it"):
        StoreWeights(run.store).fetch(replace(run.records[1], objects=(later,)))


def test_a_publisher_starts_with_an_anchor_in_every_process_and_attempt():
    run = Run(3)
    assert [record.base for record in run.records] == [None, version(0), version(1)]
    again = StoreWeights(run.store).publish(version(3), key(version(3)), run.tensors[2])
    assert again.base is None
    assert run.publish(2, attempt=2).base is None


def test_after_known_weights_and_after_a_failed_put_the_next_version_is_an_anchor():
    run = Run(3)
    known = run.records[2]
    puts = len(run.store.puts)
    assert run.publisher.publish(version(2, 2), key(version(2, 2)), run.tensors[2], known) == known
    assert len(run.store.puts) == puts
    run.tensors.append(stepped(run.tensors[2], 3))
    assert run.publish(3).base is None
    run.tensors.append(stepped(run.tensors[3], 4))
    run.store.fail("*delta*", error=StoreError("the disk is full"))
    with pytest.raises(StoreError, match="disk is full"):
        run.publish(4)
    assert run.publish(4).base is None
    same_bits(StoreWeights(run.store).fetch(run.records[4]), run.tensors[4])


def test_another_set_of_tensors_and_every_version_where_that_is_asked_for_are_anchors():
    run = Run(2)
    run.tensors.append({**run.tensors[1], "more": torch.ones(3)})
    assert run.publish(2).base is None
    assert [record.base for record in Run(4, anchor_every=1).records] == [None] * 4


def store_ranks(store, tensors, count):
    return Ranks(Layout.of(tensors), count, lambda share: StoreWeights(store, share=share))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_ranks_that_put_a_part_each_make_the_same_version_as_one_alone(count):
    store, tensors = MemoryStore(), large_set()
    ranks, alone, reader = store_ranks(store, tensors, count), StoreWeights(MemoryStore()), StoreWeights(store)
    for iteration in range(3):
        records = ranks.publish(version(iteration), tensors)
        assert all(record == records[0] for record in records)
        assert records[0].checksum == alone.publish(version(iteration), key(version(iteration)), tensors).checksum
        assert records[0].base == (version(iteration - 1) if iteration else None)
        assert len(records[0].objects) == (count if iteration else len(records[0].objects))
        same_bits(reader.fetch(records[0]), tensors)
        tensors = stepped(tensors, iteration, size=1e-2)


def test_where_one_rank_cannot_put_its_part_all_of_them_fail_and_anchor_the_next_version():
    store, tensors = MemoryStore(), large_set()
    ranks = store_ranks(store, tensors, 3)
    ranks.publish(version(0), tensors)
    store.fail("*delta-0001", error=StoreError("the disk is full"))
    answers = ranks.publish(version(1), stepped(tensors, 1))
    assert all(isinstance(answer, StoreError) for answer in answers)
    assert ranks.publish(version(1), stepped(tensors, 1))[0].base is None


def test_parts_of_two_deltas_do_not_mix():
    store, tensors = MemoryStore(), large_set()
    ranks = store_ranks(store, tensors, 2)
    records = [ranks.publish(version(0), tensors)[0]]
    for iteration in (1, 2):
        tensors = stepped(tensors, iteration, size=1e-2)
        records.append(ranks.publish(version(iteration), tensors)[0])
    reader = StoreWeights(store)
    for objects in (records[2].objects[:1], records[2].objects[::-1], (records[1].objects[0], records[2].objects[1])):
        with pytest.raises(CorruptObjectError, match=r"not the parts of one delta to 1\.1"):
            reader.fetch(replace(records[2], objects=objects))
    same_bits(reader.fetch(records[2]), tensors)


def addresses(tensors):
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor.numel()}


def test_tensors_stay_as_they_are_for_as_long_as_somebody_holds_them():
    run = Run(6)
    reader = StoreWeights(run.store)
    served = reader.fetch(run.records[0])
    for iteration in range(1, 6):
        before = copied(served)
        found = reader.fetch(run.records[iteration])
        same_bits(found, run.tensors[iteration])
        same_bits(served, before)
        assert not set(addresses(found).values()) & set(addresses(served).values())
        served = found


def test_a_served_version_and_the_next_take_turns_in_two_sets_of_memory():
    run = Run(6)
    reader, seen = StoreWeights(run.store), []
    served = reader.fetch(run.records[0])
    for record in run.records[1:]:
        served = reader.fetch(record)
        seen.append(addresses(served))
    assert seen[0] == seen[2] == seen[4]
    assert seen[1] == seen[3]


def test_what_nobody_holds_is_brought_up_to_date_in_place():
    run = Run(4)
    reader = StoreWeights(run.store)
    seen = [addresses(reader.fetch(record)) for record in run.records]
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_a_version_that_was_fetched_but_never_served_leaves_the_served_one_alone():
    run = Run(5)
    reader = StoreWeights(run.store)
    served = reader.fetch(run.records[1])
    for iteration in (2, 3, 4, 0, 4):
        same_bits(reader.fetch(run.records[iteration]), run.tensors[iteration])
        same_bits(served, run.tensors[1])


def test_the_same_version_again_is_the_same_tensors():
    run = Run(3)
    reader = StoreWeights(run.store)
    first = reader.fetch(run.records[1])
    again = reader.fetch(run.records[1])
    assert again is first
    del first
    reader.fetch(run.records[2])
    same_bits(again, run.tensors[1])


@pytest.mark.parametrize("damage", [DAMAGES["truncated"], DAMAGES["a bit flipped in the codes"]])
def test_a_delta_that_is_refused_leaves_what_is_served_as_it_was(damage):
    run = Run(4)
    reader = StoreWeights(run.store)
    served = reader.fetch(run.records[1])
    ref = damaged(run.store, run.records[2].objects[0], damage)
    with pytest.raises(CorruptObjectError):
        reader.fetch(replace(run.records[2], objects=(ref,)))
    same_bits(served, run.tensors[1])
