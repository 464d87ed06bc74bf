"""Weights by collectives: each learner rank broadcasts its part to all engines that ask for it at about the same time.

::

    engine 0 ── asks for 7.1 ──► ┐                    ┌─ place in a group ─► engine 0 ┐
    engine 1 ── asks for 7.1 ──► ├─ rank 0 listens ──►┼─ place in a group ─► engine 1 ├─ chunk by chunk, from rank 0
                                 │                    └─ broadcasts ───────► (group)  ┘
    engine 2 ── asks later ────► ┘ gets a group of its own, while the first one's chunks travel

A group of ``torch.distributed`` (gloo) exists for one version and one rank's part, and holds who asked for it: engines
that are not there yet are not waited for. Every step has a deadline, and where a member dies the others fail at once
or at theirs, and ask again. Nothing but a notice of where to ask goes to the store.
"""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import LearnerLostError, ObjectMissingError, ResourceError, first_line
from steadyhelm.store import ObjectStore
from steadyhelm.store.records import from_json, to_json
from steadyhelm.weights.checksum import combined, digest, in_threads, require_checksum, set_checksum
from steadyhelm.weights.codec import DTYPE_NAMES, DTYPES
from steadyhelm.weights.layout import Block, Layout, flat_words
from steadyhelm.weights.notice import announce, read_notice
from steadyhelm.weights.share import Share

LOOPBACK = "127.0.0.1"
KEPT = 2
"""Versions that a publisher holds: an engine that starts may still ask for the one before."""
CHUNK = 16 << 20
"""Bytes of one collective."""
AHEAD = 3
"""Collectives that are under way at a time."""
GATHER_S = 0.05
"""How long a rank waits for further engines behind each one that asks, and ``GATHERED`` times that at most."""
GATHERED = 10
CONNECT_S = 15.0
"""Longest wait for a connection, a question, an answer, and for a group to come together."""
CHUNK_S = 60.0
"""Longest time for one collective."""
TRIES = 3
"""How often a reader asks for a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Where a rank is asked for its part, and the word that it asks for in turn."""

    host: str
    port: int
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A tensor of the set. Example: ``Described(name="lm_head.weight", dtype="BF16", shape=(512, 128))``."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Who has which part of a version: one sender for each, in the parts' order, and all tensors."""

    senders: tuple[Sender, ...]
    tensors: tuple[Described, ...]

    @property
    def layout(self) -> Layout:
        """The set's layout."""
        return Layout.from_specs((item.name, DTYPES[item.dtype], item.shape) for item in self.tensors)


class BroadcastWeights:
    """Publishes versions from this process's memory, and fetches them from others'. One call at a time.

    Args:
        store: where notices are put and read.
        host: the address of this machine under which engines reach a publisher.
        threads: blocks that are worked on at a time.
        share: this publisher's part; None for all of whatever is published.
    """

    def __init__(
        self, store: ObjectStore, *, host: str = LOOPBACK, threads: int = 1, share: Share | None = None
    ) -> None:
        self._store = store
        self._host = host
        self._threads = threads
        self._share = share
        self._parts: _Parts | None = None

    def publish(
        self,
        version: PolicyVersion,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        known: WeightsRecord | None = None,
    ) -> WeightsRecord:
        """Keeps a copy of ``tensors`` for whoever asks, and puts a notice of it under ``key``.

        ``known`` is adopted only where this very publisher still holds it.

        Raises:
            ResourceError: no port can be had.
            StoreError: the notice could not be put.
        """
        share = self._share or Share(layout=Layout.of(tensors))
        told = [json.loads(text) for text in share.exchange(lambda: self._keep(version, share, tensors))]
        checksum = combined(share.layout, bytes.fromhex("".join(answer["digests"] for answer in told)))
        if known is not None and known.checksum == checksum and self._parts and str(known.version) in self._parts:
            return known
        senders = tuple(from_json(Sender, answer["sender"], "a rank's address") for answer in told)
        specs = share.layout.specs
        described = tuple(Described(name=spec.name, dtype=DTYPE_NAMES[spec.dtype], shape=spec.shape) for spec in specs)
        notice = Notice(senders=senders, tensors=described)
        return announce(self._store, share, f"{key}/broadcast.json", notice, version, checksum)

    def fetch(self, record: WeightsRecord) -> Mapping[str, torch.Tensor]:
        """The tensors of ``record``, verified as a whole against its checksum.

        Raises:
            LearnerLostError: a rank that has a part of them does not answer.
            ObjectMissingError: a rank has given them up for later ones, or there is no notice of them.
            CorruptObjectError: they are not what ``record`` says.
        """
        notice = read_notice(Notice, self._store, record, "for broadcast")
        layout = notice.layout
        tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in layout.specs}
        flat = {name: flat_words(tensor) for name, tensor in tensors.items()}

        def receive(index: int) -> None:
            blocks = [layout.blocks[block] for block in layout.part(index, len(notice.senders))]
            if blocks:
                _receive(notice.senders[index], record, blocks, flat)

        in_threads(receive, range(len(notice.senders)), len(notice.senders))
        require_checksum(set_checksum(tensors, self._threads), record)
        return tensors

    def close(self) -> None:
        """Gives up what it holds; readers in the middle of it fail."""
        if self._parts is not None:
            self._parts.close()
            self._parts = None

    def _keep(self, version: PolicyVersion, share: Share, tensors: Mapping[str, torch.Tensor]) -> str:
        """Copies this rank's part; where to ask for it, and its blocks' digests in hex, as JSON."""
        flat = {name: flat_words(tensors[name]) for name in share.names}
        part = torch.empty(sum(block.num_bytes for block in share.blocks), dtype=torch.uint8)
        begins = np.cumsum([0, *(block.num_bytes for block in share.blocks)])

        def copy(index: int) -> bytes:
            views = share.blocks[index].views(flat)
            at = int(begins[index])
            for view in views:
                part.numpy()[at : at + view.nbytes] = view.view(np.uint8)
                at += view.nbytes
            return digest(views)

        digests = b"".join(in_threads(copy, range(len(share.blocks)), self._threads)).hex()
        if self._parts is None:
            self._parts = _Parts(self._host)
        self._parts.add(str(version), part)
        return json.dumps({"sender": to_json(self._parts.sender), "digests": digests})


class _Parts:
    """A rank's parts of its latest versions, served to whoever asks on threads of their own.

    Args:
        host: the address to listen on. Raises ResourceError where that is impossible.
    """

    def __init__(self, host: str) -> None:
        try:
            self._listener = socket.create_server((host, 0), backlog=1024)
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_seconds(CONNECT_S))
        except (OSError, RuntimeError) as error:
            raise ResourceError(
                f"no port of {host} can be had to broadcast weights from ({error}): set weights.type to 'store'"
            ) from error
        self.sender = Sender(host=host, port=self._listener.getsockname()[1], token=secrets.token_hex(16))
        self._held: dict[str, torch.Tensor] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._lock = threading.Lock()
        self._groups = count()
        self._closed = threading.Event()
        threading.Thread(target=self._serve, name="broadcast", daemon=True).start()

    def __contains__(self, version: str) -> bool:
        return version in self._held

    def add(self, version: str, part: torch.Tensor) -> None:
        """Serves ``part`` from now on, and no longer the oldest."""
        held = {**self._held, version: part}
        self._held = dict(list(held.items())[-KEPT:])

    def close(self) -> None:
        """Takes no further questions."""
        self._held = {}
        self._closed.set()
        with suppress(OSError):  # wakes the thread that waits in accept
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        """Has each who asks answered on a thread of its own, whatever becomes of it, until this is closed."""
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
                try:
                    threading.Thread(target=self._answer, args=(connection,), name="broadcast", daemon=True).start()
                except RuntimeError:  # no further thread can be had; whoever asked asks again
                    connection.close()
            except OSError:  # closed; or too many files are open, which passes
                self._closed.wait(0.1)

    def _answer(self, connection: socket.socket) -> None:
        """Reads who asks for what; the first to ask for a version makes the group of those who do so too."""
        try:
            connection.settimeout(CONNECT_S)
            question = _read_line(connection)
            if not hmac.compare_digest(str(question["token"]).encode(), self.sender.token.encode()):
                raise ValueError("another publisher's token")
            version = str(question["version"])
        except Exception:  # whatever a stranger sends: there is no answer without the right word
            connection.close()
            return
        with self._lock:
            waiting = self._waiting.get(version)
            if waiting is not None:
                waiting.join(connection)
                return
            waiting = self._waiting[version] = _Waiting(connection)
        waiting.gather()
        with self._lock:
            del self._waiting[version]
        try:
            self._send(version, f"{version}/{next(self._groups)}", waiting.members)
        finally:
            for member in waiting.members:
                member.close()

    def _send(self, version: str, name: str, members: Sequence[socket.socket]) -> None:
        """Broadcasts a part to ``members`` in the group ``name``; they see for themselves where that fails."""
        part = self._held.get(version)
        alive = [member for member in members if not _has_closed(member)]
        answers = [
            {"gone": True} if part is None else {"port": self._store.port, "group": name, "rank": rank}
            for rank, _ in enumerate(alive, 1)
        ]
        for member, answer in zip(alive, answers, strict=True):
            with suppress(OSError):  # it is missing in the group then, which fails for all
                _write_line(member, {**answer, "size": len(alive) + 1})
        if part is not None and alive:
            with suppress(RuntimeError), _Group(self._store, name, 0, len(alive) + 1, self.sender.host) as group:
                group.send(part)


class _Waiting:
    """Who has asked for a version and waits for others that do."""

    def __init__(self, first: socket.socket) -> None:
        self.members = [first]
        self._last = time.monotonic()

    def join(self, member: socket.socket) -> None:
        """One more."""
        self.members.append(member)
        self._last = time.monotonic()

    def gather(self) -> None:
        """Returns when nobody has joined for ``GATHER_S``, or after ``GATHERED`` times that."""
        end = time.monotonic() + GATHERED * GATHER_S
        while (left := min(self._last + GATHER_S, end) - time.monotonic()) > 0:
            time.sleep(left)


class _Group:
    """A gloo group of a sender (rank 0) and its readers, for one part. Raises RuntimeError, as torch does."""

    def __init__(self, store: TCPStore, name: str, rank: int, size: int, host: str) -> None:
        self.rank = rank
        gloo: Any = ProcessGroupGloo  # torch's types leave out most of it
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = _seconds(CONNECT_S)
        self._group = gloo(PrefixStore(name, store), rank, size, options)

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *exception: object) -> None:
        self._group = None  # a group of gloo ends, and closes its connections, with its last reference

    def send(self, part: torch.Tensor) -> None:
        """Sends ``part`` [bytes] to all others."""
        chunks = (part[begin : begin + CHUNK] for begin in range(0, len(part), CHUNK))
        for _ in self._broadcast(chunks):
            pass

    def receive(self, num_bytes: int, take: Callable[[NDArray[np.uint8]], None]) -> None:
        """Gives ``take`` one chunk after the other of what rank 0 sends; a chunk is lent until ``take`` returns."""
        lent = [torch.empty(min(CHUNK, num_bytes), dtype=torch.uint8) for _ in range(AHEAD)]
        begins = range(0, num_bytes, CHUNK)
        chunks = (lent[n % AHEAD][: num_bytes - begin] for n, begin in enumerate(begins))
        for chunk in self._broadcast(chunks):
            take(chunk.numpy())

    def _broadcast(self, chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Broadcasts ``AHEAD`` chunks at a time, each with a deadline; yields each that is done, in order."""
        under_way: deque[tuple[Any, torch.Tensor]] = deque()
        try:
            for chunk in chunks:
                under_way.append((self._group.broadcast(chunk, 0, _seconds(CHUNK_S)), chunk))
                if len(under_way) == AHEAD:
                    yield _done(*under_way.popleft())
            while under_way:
                yield _done(*under_way.popleft())
        finally:
            under_way.clear()


def _done(work: Any, chunk: torch.Tensor) -> torch.Tensor:
    work.wait(_seconds(CHUNK_S))
    return chunk


class _Unpacking:
    """Copies a part's bytes, chunk by chunk, to where its blocks' elements belong."""

    def __init__(self, blocks: Sequence[Block], flat: Mapping[str, NDArray[Any]]) -> None:
        self._views = (view.view(np.uint8) for block in blocks for view in block.views(flat))
        self._open: NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, chunk: NDArray[np.uint8]) -> None:
        """The next bytes."""
        while len(chunk):
            if not len(self._open):
                self._open = next(self._views)
            count = min(len(self._open), len(chunk))
            self._open[:count] = chunk[:count]
            self._open, chunk = self._open[count:], chunk[count:]


def _receive(sender: Sender, record: WeightsRecord, blocks: Sequence[Block], flat: Mapping[str, NDArray[Any]]) -> None:
    """Fills a rank's part of the tensors. Raises LearnerLostError, ObjectMissingError."""
    num_bytes = sum(block.num_bytes for block in blocks)
    for _ in range(TRIES):
        try:
            with _place(sender, record) as group:
                group.receive(num_bytes, _Unpacking(blocks, flat).take)
            return
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            failure = error.with_traceback(None)  # which would keep the group, and so its connections
    raise LearnerLostError(
        f"The learner rank that has weights {record.version} ({sender.host}:{sender.port}) did not send them, asked "
        f"{TRIES} times: {first_line(failure)}"
    ) from failure


@contextmanager
def _place(sender: Sender, record: WeightsRecord) -> Iterator[_Group]:
    """This reader's place in a group that ``sender`` makes; until then the connection says that the reader lives."""
    with socket.create_connection((sender.host, sender.port), timeout=CONNECT_S) as connection:
        _write_line(connection, {"token": sender.token, "version": str(record.version)})
        answer = _read_line(connection)
        if "gone" in answer:
            raise ObjectMissingError(f"weights {record.version} were given up by their learner for later ones")
        store = TCPStore(sender.host, answer["port"], is_master=False, timeout=_seconds(CONNECT_S))
        own = connection.getsockname()[0]
        with _Group(store, answer["group"], answer["rank"], answer["size"], own) as group:
            yield group


def _has_closed(connection: socket.socket) -> bool:
    """Whether the other side, which says nothing while it waits, is gone."""
    looks = select.poll()
    looks.register(connection, select.POLLIN)
    return bool(looks.poll(0))


def _write_line(connection: socket.socket, data: Mapping[str, object]) -> None:
    connection.sendall(json.dumps(data).encode() + b"\n")


def _read_line(connection: socket.socket) -> dict[str, Any]:
    """A JSON object on a line of at most 4 KiB. Raises OSError, ValueError."""
    with connection.makefile("rb") as stream:
        found = json.loads(stream.readline(4096))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _seconds(count: float) -> timedelta:
    return timedelta(seconds=count)
