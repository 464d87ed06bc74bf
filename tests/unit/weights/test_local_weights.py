"""Weights through shared memory: really mapped files, of publishers that are really killed."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import ConfigError, CorruptObjectError, ObjectMissingError, ResourceError, StoreError
from steadyhelm.store import LocalStore
from steadyhelm.store.records import from_json
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights import local
from steadyhelm.weights.layout import Layout
from steadyhelm.weights.local import LocalWeights
from steadyhelm.weights.share import Share
from steadyhelm.weights.store import StoreWeights

from tests.unit.weights.versions import Ranks, key, large_set, same_bits, small_set, stepped, version


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A folder that stands for this machine's shared memory."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(local, "memory_folder", lambda num_bytes: folder)
    monkeypatch.setattr(local, "FOLDERS", (folder,))
    return folder


@pytest.fixture
def publisher(memory):
    made = LocalWeights(MemoryStore())
    yield made
    made.close()


def publish(publisher, iteration, tensors, attempt=1):
    of = version(iteration, attempt)
    return publisher.publish(of, key(of), tensors)


def reader(publisher, threads=1):
    return LocalWeights(publisher._store, threads=threads)


def files(memory):
    return sorted(path.name for path in memory.glob("*/*") if path.name != "lock")


def test_every_type_and_shape_comes_back_bit_for_bit(publisher):
    record = publish(publisher, 3, small_set())
    assert record.version == version(3)
    assert record.base is None
    assert record.checksum == StoreWeights(MemoryStore()).publish(version(3), key(version(3)), small_set()).checksum
    same_bits(reader(publisher, threads=2).fetch(record), small_set())


def test_the_store_gets_a_notice_and_none_of_the_weights(publisher):
    record = publish(publisher, 0, {"weight": torch.randn(100_000)})
    (ref,) = record.objects
    assert ref.key == "run/weights/000000.1/local.json"
    assert ref.num_bytes < 300


def test_the_file_is_one_that_the_safetensors_library_reads(publisher):
    found = reader(publisher).fetch(publish(publisher, 0, small_set()))
    same_bits(load_file(found.path), {name: tensor.contiguous() for name, tensor in small_set().items()})


@pytest.mark.parametrize("more", range(0, 64, 8))
def test_tensors_begin_where_a_processor_loads_them_at_once(publisher, more):
    tensors = {"x" * (1 + more): torch.randn(3, 16), "y": torch.randn(32)}
    found = reader(publisher).fetch(publish(publisher, 0, tensors))
    assert {tensor.data_ptr() % 64 for tensor in found.values()} == {0}


@pytest.mark.parametrize("count", [2, 7])
def test_ranks_write_a_part_each_of_one_file(memory, count):
    store, tensors = MemoryStore(), large_set()
    ranks = Ranks(Layout.of(tensors), count, lambda share: LocalWeights(store, share=share))
    for iteration in range(2):
        records = ranks.publish(version(iteration), tensors)
        assert all(record == records[0] for record in records)
        same_bits(LocalWeights(store).fetch(records[0]), tensors)
        assert len(files(memory)) == iteration + 1
        tensors = stepped(tensors, iteration)
    for rank in ranks.publishers:
        rank.close()


def test_where_one_rank_cannot_write_all_fail_and_the_next_version_is_whole(memory, monkeypatch):
    store, tensors = MemoryStore(), large_set()
    ranks = Ranks(Layout.of(tensors), 3, lambda share: LocalWeights(store, share=share))
    real, left = os.pwrite, [2]

    def full(*arguments):
        if left[0]:
            left[0] -= 1
            return real(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    answers = ranks.publish(version(0), tensors)
    assert any(isinstance(answer, ResourceError) for answer in answers)
    assert all(isinstance(answer, (ResourceError, StoreError)) for answer in answers)
    monkeypatch.setattr(os, "pwrite", real)
    same_bits(LocalWeights(store).fetch(ranks.publish(version(0), tensors)[0]), tensors)
    for rank in ranks.publishers:
        rank.close()


def test_no_room_in_shared_memory_names_the_remedies(publisher, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"room for 3 versions \(--shm-size .*set weights.type to 'store'"):
        publish(publisher, 0, small_set())


def test_two_versions_have_names_and_what_is_mapped_outlives_its_name(publisher, memory):
    versions, records, held = [small_set()], [], []
    for iteration in range(4):
        records.append(publish(publisher, iteration, versions[-1]))
        held.append(reader(publisher).fetch(records[-1]))
        versions.append(stepped(versions[-1], iteration))
        assert len(files(memory)) == min(iteration + 1, 2)
    for tensors, expected in zip(held, versions, strict=False):
        same_bits(tensors, expected)
    same_bits(reader(publisher).fetch(records[2]), versions[2])
    with pytest.raises(ObjectMissingError, match=r"weights 1\.1 are not at .*'store'"):
        reader(publisher).fetch(records[1])


def test_what_a_reader_does_to_its_tensors_nobody_else_sees(publisher):
    record = publish(publisher, 0, small_set())
    reader(publisher).fetch(record)["embed"].zero_()
    same_bits(reader(publisher).fetch(record), small_set())


def test_known_weights_are_published_anew_since_their_learner_is_gone(publisher):
    known = publish(publisher, 3, small_set())
    again = publisher.publish(version(3, 2), key(version(3, 2)), small_set(), known)
    assert again.version == version(3, 2)
    assert again.checksum == known.checksum
    publish(publisher, 4, small_set(), attempt=2)
    same_bits(reader(publisher).fetch(again), small_set())


def test_another_machine_is_refused_by_name(publisher, monkeypatch):
    record = publish(publisher, 0, small_set())
    monkeypatch.setattr(local, "this_machine", lambda: "another")
    with pytest.raises(ConfigError, match=r"different machines: set weights.type to 'store'"):
        reader(publisher).fetch(record)


def test_ranks_on_several_machines_are_refused(memory):
    tensors = small_set()
    share = Share(
        layout=Layout.of(tensors), count=2, exchange=lambda work: [work(), '{"machine": "the other rank\'s"}']
    )
    publisher = LocalWeights(MemoryStore(), share=share)
    with pytest.raises(ConfigError, match=r"ranks are on several machines: set weights.type to 'store'"):
        publish(publisher, 0, tensors)
    publisher.close()


DAMAGES = {
    "a bit flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "truncated": lambda data: data[:-1],
    "empty": lambda data: b"",
    "another file": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_not_what_the_record_says_is_refused(publisher, damage):
    record = publish(publisher, 0, small_set())
    path = reader(publisher).fetch(record).path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptObjectError):
        reader(publisher).fetch(record)


def test_a_record_of_another_version_or_transport_is_refused(publisher):
    first, second = publish(publisher, 0, small_set()), publish(publisher, 1, stepped(small_set(), 1))
    with pytest.raises(CorruptObjectError, match="their record says"):
        reader(publisher).fetch(replace(second, objects=first.objects))
    stored = StoreWeights(publisher._store).publish(version(2), key(version(2)), small_set())
    for other in (stored, replace(stored, objects=())):
        with pytest.raises(CorruptObjectError):
            reader(publisher).fetch(other)
    with pytest.raises(CorruptObjectError):
        StoreWeights(publisher._store).fetch(second)


def test_the_end_of_a_publisher_leaves_nothing(memory):
    publisher = LocalWeights(MemoryStore())
    publish(publisher, 0, small_set())
    publisher.close()
    publisher.close()
    assert list(memory.iterdir()) == []


KILLED = """
import json, os, signal, sys
from pathlib import Path
from steadyhelm.store import LocalStore
from steadyhelm.store.records import to_json
from steadyhelm.weights import local
from tests.unit.weights.versions import key, small_set, version
folder = Path(sys.argv[1])
local.memory_folder = lambda num_bytes: folder / "memory"
publisher = local.LocalWeights(LocalStore(folder / "store"))
record = publisher.publish(version(7), key(version(7)), small_set())
print(json.dumps(to_json(record)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_learner_leaves_serves_newcomers_until_the_next_one_has_published(memory, tmp_path):
    root = Path(__file__).resolve().parents[3]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert killed.returncode == -9, killed.stderr
    old = from_json(WeightsRecord, json.loads(killed.stdout), "the killed learner")
    store = LocalStore(tmp_path / "store")
    living = LocalWeights(store)
    publish(living, 1, small_set())
    publisher = LocalWeights(store)
    publish(publisher, 7, stepped(small_set(), 1), attempt=2)
    same_bits(LocalWeights(store).fetch(old), small_set())
    assert len(list(memory.iterdir())) == 3
    publish(publisher, 8, stepped(small_set(), 2), attempt=2)
    assert len(list(memory.iterdir())) == 2
    with pytest.raises(ObjectMissingError, match=r"weights 7\.1 are not at"):
        LocalWeights(store).fetch(old)
    for own in (living, publisher):
        own.close()


def test_a_link_is_the_same_file_under_another_name(publisher, tmp_path):
    found = reader(publisher).fetch(publish(publisher, 0, small_set()))
    target = tmp_path / "linked"
    assert found.link(target) == xxhash.xxh3_128_hexdigest(found.path.read_bytes())
    assert target.samefile(found.path)
    assert found.link(tmp_path / "no such folder" / "linked") is None


def test_versions_are_told_apart_in_the_name_of_their_file(publisher, memory):
    publish(publisher, 7, small_set())
    publish(publisher, 7, small_set())
    assert files(memory) == [f"{PolicyVersion(iteration=7, attempt=1)}-{number}" for number in (0, 1)]
