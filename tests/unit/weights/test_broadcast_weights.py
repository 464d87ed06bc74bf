"""Weights by broadcast: real sockets and gloo groups, of members that fall silent and publishers that are killed."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from steadyhelm.data.types import WeightsRecord
from steadyhelm.errors import CorruptObjectError, LearnerLostError, ObjectMissingError, ResourceError
from steadyhelm.store import LocalStore
from steadyhelm.store.records import from_json, loads
from steadyhelm.testing.memory_store import MemoryStore
from steadyhelm.weights import broadcast
from steadyhelm.weights.broadcast import BroadcastWeights, Notice
from steadyhelm.weights.layout import Layout
from steadyhelm.weights.store import StoreWeights

from tests.unit.weights.versions import Ranks, key, large_set, same_bits, small_set, stepped, version


@pytest.fixture
def publisher():
    made = BroadcastWeights(MemoryStore())
    yield made
    made.close()


def publish(publisher, iteration, tensors, known=None):
    return publisher.publish(version(iteration), key(version(iteration)), tensors, known)


def reader(publisher):
    return BroadcastWeights(publisher._store)


def notice(publisher, record):
    (ref,) = record.objects
    return from_json(Notice, loads(publisher._store.read(ref), ref.key), ref.key)


def asked(publisher, record):
    """A connection by which somebody has asked for ``record`` and says no more."""
    (sender,) = notice(publisher, record).senders
    connection = socket.create_connection((sender.host, sender.port))
    connection.sendall(json.dumps({"token": sender.token, "version": str(record.version)}).encode() + b"\n")
    return connection


def fetched_by(readers, publisher, record):
    """What several readers get that ask at one time."""
    together = threading.Barrier(readers)

    def one(_):
        together.wait(30)
        return reader(publisher).fetch(record)

    with ThreadPoolExecutor(readers) as pool:
        return list(pool.map(one, range(readers)))


def groups(monkeypatch):
    """The sizes of the groups that senders make from now on."""
    sizes = []
    real = broadcast._Group.__init__

    def made(self, store, name, rank, size, host):
        if rank == 0:
            sizes.append(size)
        real(self, store, name, rank, size, host)

    monkeypatch.setattr(broadcast._Group, "__init__", made)
    return sizes


def test_engines_that_ask_at_one_time_are_served_by_one_broadcast(publisher, monkeypatch):
    monkeypatch.setattr(broadcast, "GATHER_S", 3.0)
    sizes = groups(monkeypatch)
    record = publish(publisher, 3, large_set())
    for found in fetched_by(4, publisher, record):
        same_bits(found, large_set())
    assert sizes == [5]


def test_the_checksum_is_that_of_the_other_ways(publisher):
    record = publish(publisher, 3, small_set())
    assert record.checksum == StoreWeights(MemoryStore()).publish(version(3), key(version(3)), small_set()).checksum
    assert record.base is None


def test_the_store_gets_a_notice_and_none_of_the_weights(publisher):
    (ref,) = publish(publisher, 0, {"weight": torch.randn(100_000)}).objects
    assert ref.key == "run/weights/000000.1/broadcast.json"
    assert ref.num_bytes < 300


def test_each_rank_sends_its_own_part_in_chunks(monkeypatch):
    monkeypatch.setattr(broadcast, "CHUNK", 100_001)
    store, tensors = MemoryStore(), large_set()
    ranks = Ranks(Layout.of(tensors), 3, lambda share: BroadcastWeights(store, share=share))
    records = ranks.publish(version(0), tensors)
    assert len({sender.port for sender in notice(ranks.publishers[0], records[0]).senders}) == 3
    for found in fetched_by(2, ranks.publishers[0], records[0]):
        same_bits(found, tensors)
    for rank in ranks.publishers:
        rank.close()


def test_two_versions_are_held_and_earlier_ones_are_given_up(publisher):
    tensors, records = small_set(), []
    for iteration in range(3):
        records.append(publish(publisher, iteration, tensors))
        tensors = stepped(tensors, iteration)
    with pytest.raises(ObjectMissingError, match=r"0\.1 were given up by their learner for later ones"):
        reader(publisher).fetch(records[0])
    same_bits(reader(publisher).fetch(records[1]), stepped(small_set(), 0))


def test_known_weights_are_adopted_by_whoever_still_holds_them_only(publisher):
    record = publish(publisher, 0, small_set())
    assert publish(publisher, 1, small_set(), record) == record
    another = BroadcastWeights(publisher._store)
    assert publish(another, 1, small_set(), record).version == version(1)
    another.close()


def test_a_member_that_asks_and_then_falls_silent_costs_the_others_a_second_try(publisher, monkeypatch):
    monkeypatch.setattr(broadcast, "GATHER_S", 2.0)
    monkeypatch.setattr(broadcast, "CONNECT_S", 5.0)
    sizes = groups(monkeypatch)
    record = publish(publisher, 0, small_set())
    with asked(publisher, record):
        same_bits(reader(publisher).fetch(record), small_set())
    assert sizes == [3, 2]


def test_a_member_that_is_gone_before_the_group_is_left_out(publisher, monkeypatch):
    monkeypatch.setattr(broadcast, "GATHER_S", 1.0)
    sizes = groups(monkeypatch)
    record = publish(publisher, 0, small_set())
    asked(publisher, record).close()
    same_bits(reader(publisher).fetch(record), small_set())
    assert sizes == [2]


def test_where_one_reader_ends_in_the_middle_the_others_fail_at_once_and_ask_again(publisher, monkeypatch):
    monkeypatch.setattr(broadcast, "GATHER_S", 2.0)
    monkeypatch.setattr(broadcast, "CHUNK", 1 << 16)
    record = publish(publisher, 0, large_set())
    real, struck = broadcast._Group.receive, []

    def once(self, num_bytes, take):
        if self.rank == 2 and not struck:
            struck.append(True)
            raise RuntimeError("this reader was struck")
        real(self, num_bytes, take)

    monkeypatch.setattr(broadcast._Group, "receive", once)
    started = time.monotonic()
    for found in fetched_by(3, publisher, record):
        same_bits(found, large_set())
    assert struck
    assert time.monotonic() - started < broadcast.CHUNK_S / 2


def test_a_version_that_is_given_up_while_it_is_sent_arrives_whole(publisher, monkeypatch):
    record = publish(publisher, 0, small_set())
    real = broadcast._Group.send

    def replaced(self, part):
        for iteration in (1, 2):
            publish(publisher, iteration, small_set(seed=iteration))
        real(self, part)

    monkeypatch.setattr(broadcast._Group, "send", replaced)
    same_bits(reader(publisher).fetch(record), small_set())


STRANGE = [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"token": "0"}\n', b"[1]\n", b"\xff" * 9000, b"[" * 4000 + b"\n"]
STRANGE.append('{"token": "é"}\n'.encode())


@pytest.mark.parametrize("question", STRANGE)
def test_whoever_has_not_the_right_word_gets_no_answer_and_disturbs_nobody(publisher, question):
    record = publish(publisher, 0, small_set())
    (sender,) = notice(publisher, record).senders
    address = (sender.host, sender.port)
    with socket.create_connection(address, timeout=20) as stranger, socket.create_connection(address):  # one is mute
        stranger.sendall(question)
        with contextlib.suppress(OSError):  # it may have been shown the door already
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(100) == b""
    same_bits(reader(publisher).fetch(record), small_set())


def test_what_arrives_otherwise_than_it_was_published_is_refused(publisher):
    record = publish(publisher, 0, small_set())
    publisher._parts._held["0.1"][7] ^= 1
    with pytest.raises(CorruptObjectError, match="their record says"):
        reader(publisher).fetch(record)


def test_a_closed_publisher_is_named_and_its_token_is_not(publisher, monkeypatch):
    record = publish(publisher, 0, small_set())
    (sender,) = notice(publisher, record).senders
    publisher.close()
    with pytest.raises(LearnerLostError, match=rf"has weights 0\.1 \({re.escape(sender.host)}:{sender.port}") as caught:
        reader(publisher).fetch(record)
    assert sender.token not in str(caught.value)


def test_no_port_names_the_remedy():
    with pytest.raises(ResourceError, match=r"set weights\.type to 'store'"):
        publish(BroadcastWeights(MemoryStore(), host="192.0.2.1"), 0, small_set())


PUBLISHER = """
import json, sys, time, torch
from pathlib import Path
from steadyhelm.store import LocalStore
from steadyhelm.store.records import to_json
from steadyhelm.data.types import PolicyVersion
from steadyhelm.weights import broadcast
broadcast.CHUNK = 1 << 16
made = broadcast.BroadcastWeights(LocalStore(Path(sys.argv[1])))
record = made.publish(PolicyVersion(iteration=0, attempt=1), "run/weights/0", {"weight": torch.arange(1 << 22)})
print(json.dumps(to_json(record)), flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A publisher in a process of its own: the process, a reader's end, the record."""
    monkeypatch.setattr(broadcast, "CHUNK", 1 << 16)
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        record = from_json(WeightsRecord, json.loads(process.stdout.readline()), "the publisher's answer")
        yield process, BroadcastWeights(LocalStore(tmp_path)), record
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_weights_come_out_of_another_process_and_out_of_none_that_was_killed(other):
    process, end, record = other
    assert torch.equal(end.fetch(record)["weight"], torch.arange(1 << 22))
    process.kill()
    process.wait()
    started = time.monotonic()
    with pytest.raises(LearnerLostError, match=r"asked 3 times: .*[Rr]efused"):
        end.fetch(record)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_publisher_that_dies_or_stalls_in_the_middle_ends_the_wait(other, how, monkeypatch):
    process, end, record = other
    monkeypatch.setattr(broadcast, "CHUNK_S", 2.0)
    monkeypatch.setattr(broadcast, "CONNECT_S", 2.0)
    real = broadcast._Group.receive

    def struck(self, num_bytes, take):
        process.send_signal(how)
        real(self, num_bytes, take)

    monkeypatch.setattr(broadcast._Group, "receive", struck)
    with pytest.raises(LearnerLostError, match="did not send them"):
        end.fetch(record)
