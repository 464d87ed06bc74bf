"""The commit log of a run: only what it names exists.

Entries ``<run>/log/<seq>`` are created if absent, one after the other from 1, and never change. Creation is the only
synchronisation: no rename, no clock, no lock. An entry says its number, kind, attempt, a nonce, the checksum of the
entry before it, its payload and the checksum of all that.

- *Taking over* appends an ``attempt`` entry with the next attempt's number. From then on the slot that the former
  driver would write next is taken, by an entry of another attempt: it gets a FencedError, however long it slept.
- *A lost answer* is no failure: the writer finds its own nonce in the slot. The nonces of appends that ended in an
  error are kept too, so an entry of theirs that shows up later is taken in, not mistaken for a rival's.
- *A changed run file* is an entry too, ``run_file``: ``<run>/run.json`` is the one that the run began with.
- *A torn last entry* is void. No store makes one unless it lost power in the middle; nothing can have been built on
  it, since whatever follows a commit is committed behind it. The next attempt skips its number and says so in its own
  entry (``voided``). An unreadable entry anywhere else, or a missing one, is a CorruptObjectError.

Which entries count after a take-over: a batch, once committed, counts for all later attempts (each iteration has one,
in order). Weights of an attempt end the lineage of all weights that earlier attempts published. Of checkpoints, the
newest entry counts.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import xxhash

from steadyhelm.data.types import BatchManifest, CheckpointRecord, ObjectRef, PolicyVersion, WeightsRecord
from steadyhelm.errors import (
    ConfigError,
    CorruptObjectError,
    FencedError,
    ObjectExistsError,
    ObjectMissingError,
    RetryableError,
    StoreError,
)
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.records import Json, dumps, from_json, loads, object_refs, plain, to_json

KINDS = frozenset({"attempt", "run_file", "batch", "weights", "checkpoint", "eval", "finished"})
"""What an entry can say."""
FORMAT = 1
"""Version of the entries' format."""
TRIES = 5
"""How often a put that failed for a passing reason is tried before the error goes to the caller."""
MANY = 16
"""Entries from which on they are read side by side."""
READERS = 16
"""How many are read at a time."""
_FIELDS = {"format", "seq", "kind", "attempt", "nonce", "prev", "payload"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry of the log. ``prev`` is the checksum of the last valid entry before it, empty for the first.

    Example: ``Entry(seq=7, kind="batch", attempt=1, nonce="5f…", prev="c0…", payload={"iteration": 3, …},
    checksum="9a…")``
    """

    seq: int
    kind: str
    attempt: int
    nonce: str
    prev: str
    payload: Json
    checksum: str


@dataclass(slots=True)
class Lineage:
    """What the entries, applied in order, amount to. Each iteration has one batch, in order from 1."""

    entries: list[Entry] = field(default_factory=list)
    attempt: int = 0
    batches: list[BatchManifest] = field(default_factory=list)
    weights: dict[int, WeightsRecord] = field(default_factory=dict)
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    finished: Json | None = None
    published: dict[tuple[int, int], str] = field(default_factory=dict)

    def apply(self, entry: Entry, place: str) -> None:
        """Takes ``entry`` in. Raises StoreError, and changes nothing, where it contradicts those before it."""
        if entry.kind == "attempt":
            self._expect(entry.attempt == self.attempt + 1, place, f"attempt {entry.attempt}", self.attempt + 1)
            self.attempt = entry.attempt
        else:
            self._expect(entry.attempt == self.attempt, place, f"attempt {entry.attempt}", self.attempt)
        if entry.kind == "batch":
            manifest = from_json(BatchManifest, entry.payload, place)
            due = len(self.batches) + 1
            self._expect(manifest.iteration == due, place, f"the batch of iteration {manifest.iteration}", due)
            self.batches.append(manifest)
            self.finished = None
        elif entry.kind == "weights":
            self._apply_weights(from_json(WeightsRecord, entry.payload, place), place)
        elif entry.kind == "checkpoint":
            record = from_json(CheckpointRecord, entry.payload, place)
            iteration = record.version.iteration
            fits = 0 <= iteration <= len(self.batches)
            self._expect(fits, place, f"a checkpoint of iteration {iteration}", f"at most {len(self.batches)}")
            self.checkpoints.append(record)
        elif entry.kind == "finished":
            self.finished = entry.payload
        elif entry.kind == "run_file":
            self.finished = None
        self.entries.append(entry)

    def _apply_weights(self, record: WeightsRecord, place: str) -> None:
        iteration, attempt = record.version.iteration, record.version.attempt
        fits = 0 <= iteration <= len(self.batches)
        self._expect(fits, place, f"weights of iteration {iteration}", f"at most {len(self.batches)}")
        known = self.published.setdefault((iteration, attempt), record.checksum)
        what = f"policy version {record.version} with checksum {record.checksum}"
        self._expect(known == record.checksum, place, what, f"checksum {known}: publish under a new attempt")
        self.weights = {
            older: weights
            for older, weights in self.weights.items()
            if older < iteration and weights.version.attempt == attempt
        }
        self.weights[iteration] = record

    @staticmethod
    def _expect(fits: bool, place: str, found: str, due: object) -> None:
        if not fits:
            raise StoreError(f"{place} has {found} where the log expects {due}: it cannot be committed there")


class LogView:
    """The commit log as it was read: nothing here writes. ``torn`` is the number of a torn last entry, if any.

    Raises on reading: CorruptObjectError where an entry that others build on is unreadable or missing.
    """

    def __init__(self, store: ObjectStore, run: str) -> None:
        self._store = store
        self._layout = RunLayout(run)
        self._lineage = Lineage()
        self._torn: list[int] = []
        self.refresh()

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._layout.run

    @property
    def attempt(self) -> int:
        """Number of the newest attempt, from 1; 0 for a run that does not exist."""
        return self._lineage.attempt

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All valid entries in order."""
        return tuple(self._lineage.entries)

    @property
    def torn(self) -> int | None:
        """Number of the void entry at the end, None where the log ends cleanly."""
        return self._torn[-1] if self._torn else None

    @property
    def last_iteration(self) -> int:
        """Newest iteration whose batch is committed; 0 before the first."""
        return len(self._lineage.batches)

    def latest(self, kind: str) -> Entry | None:
        """The newest entry of that kind."""
        return next((entry for entry in reversed(self._lineage.entries) if entry.kind == kind), None)

    def batches(self, after: int = 0) -> tuple[BatchManifest, ...]:
        """The committed batches of the iterations behind ``after``, in order."""
        return tuple(self._lineage.batches[max(after, 0) :])

    def weights(self, iteration: int) -> WeightsRecord | None:
        """The weights of ``iteration`` in the surviving lineage, None where none are published."""
        return self._lineage.weights.get(iteration)

    def published(self, version: PolicyVersion) -> bool:
        """Whether the log has that policy version, in whatever lineage."""
        return (version.iteration, version.attempt) in self._lineage.published

    def latest_weights(self) -> WeightsRecord | None:
        """The newest weights of the surviving lineage."""
        return self._lineage.weights[max(self._lineage.weights)] if self._lineage.weights else None

    def checkpoint(self) -> CheckpointRecord | None:
        """The checkpoint to go on from, None for the starting point."""
        return self._lineage.checkpoints[-1] if self._lineage.checkpoints else None

    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """All that were committed, oldest first; the objects of older ones may be deleted."""
        return tuple(self._lineage.checkpoints)

    def finished(self) -> Json | None:
        """What the ``finished`` entry says, None while the run has work left (a batch or a run file reopens it)."""
        return self._lineage.finished

    def run_record(self) -> Json:
        """The run file in force, under ``run``, who wrote it, and ``after`` which iteration it holds.

        It is the newest that the log has, or the one that the run began with. Raises ConfigError where there is no run.
        """
        changed = self.latest("run_file")
        if changed is not None:
            return changed.payload
        key = self._layout.run_file
        try:
            return loads(self._store.get(key), f"{key} in {self._store.uri}")
        except ObjectMissingError:
            raise ConfigError(
                f"there is no run {self.run!r} in {self._store.uri}: give the place that 'steadyhelm run' shows"
            ) from None

    def holder(self) -> str:
        """Which attempt is newest and where it runs, for messages."""
        entry = self.latest("attempt")
        if entry is None:
            return "nobody"
        where = entry.payload
        return f"attempt {entry.attempt} (pid {where['pid']} on {where['host']}, since {where['since']})"

    def refresh(self) -> tuple[Entry, ...]:
        """Reads on to the end of the log and returns the entries that are new. Raises CorruptObjectError."""
        known = len(self._lineage.entries)
        self._torn.clear()
        ahead = self._read_ahead()
        while (entry := ahead.get(self._next) or self._read(self._next)) is not None or self._torn_at(self._next):
            if entry is None:
                self._torn.append(self._next)
            else:
                self._take_in(entry)
        if max(self._listed(), default=0) > self._next:
            if self._read(self._next) is not None:  # it was appended while we looked
                return (*self._lineage.entries[known:], *self.refresh())
            raise CorruptObjectError(
                f"{self._layout.log_entry(self._next)!r} in {self._store.uri} is missing, but later entries exist: "
                "the log was damaged by hand; put the entry back from a copy or start a new run"
            )
        return tuple(self._lineage.entries[known:])

    @property
    def _next(self) -> int:
        """Number of the first slot behind what was read."""
        last = self._lineage.entries[-1].seq if self._lineage.entries else 0
        return max([last, *self._torn]) + 1

    @property
    def _prev(self) -> str:
        return self._lineage.entries[-1].checksum if self._lineage.entries else ""

    def _place(self, seq: int) -> str:
        return f"{self._layout.log_entry(seq)!r} in {self._store.uri}"

    def _read(self, seq: int) -> Entry | None:
        """The entry at ``seq``; None where it is absent or torn."""
        try:
            return parse_entry(self._store.get(self._layout.log_entry(seq)), seq, self._place(seq))
        except (ObjectMissingError, CorruptObjectError):
            return None

    def _listed(self) -> Iterator[int]:
        names = (key.removeprefix(self._layout.log_prefix) for key in self._store.list(self._layout.log_prefix))
        return (int(name) for name in names if name.isdecimal())

    def _read_ahead(self) -> dict[int, Entry]:
        """The entries that a listing shows behind the known ones, read side by side where they are many.

        One after the other, a thousand of them take half a minute from a store that is 30 ms away.
        """
        numbers = [number for number in self._listed() if number >= self._next]
        if len(numbers) < MANY:
            return {}
        with ThreadPoolExecutor(READERS, "steadyhelm-log") as threads:
            entries = zip(numbers, threads.map(self._read, numbers), strict=True)
            return {number: entry for number, entry in entries if entry is not None}

    def _torn_at(self, seq: int) -> bool:
        """Whether the slot holds something unreadable; it is read anew, so that one bad read voids nothing."""
        return self._store.exists(self._layout.log_entry(seq)) and self._read(seq) is None

    def _take_in(self, entry: Entry) -> None:
        """Applies the next entry. Raises CorruptObjectError where it does not continue the log."""
        voided = entry.payload.get("voided", []) if entry.kind == "attempt" else []
        if voided != self._torn:
            raise CorruptObjectError(
                f"{self._place((self._torn or voided)[0])} is unreadable or was replaced, and later entries build on "
                "it: put it back from a copy or start a new run"
            )
        if entry.prev != self._prev:
            raise CorruptObjectError(
                f"{self._place(entry.seq)} follows another entry than the one before it: the log was damaged by hand; "
                "put it back from a copy or start a new run"
            )
        try:
            self._lineage.apply(entry, self._place(entry.seq))
        except StoreError as error:
            raise CorruptObjectError(f"{error}; the log was damaged by hand, start a new run") from error
        self._torn.clear()


class CommitLog(LogView):
    """The commit log in the hands of its newest attempt: made by ``take_over``."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        super().__init__(store, run)
        self._mine = 0
        self._open: set[str] = set()  # nonces of appends whose outcome is unknown
        self._lock = threading.Lock()

    @classmethod
    def read(cls, store: ObjectStore, run: str) -> LogView:
        """The log for reading only."""
        return LogView(store, run)

    @classmethod
    def take_over(cls, store: ObjectStore, run: str, reason: str) -> CommitLog:
        """Becomes the run's next attempt: any other driver's next commit raises FencedError.

        ``reason`` says in the log why: ``"start"``, ``"resume"``. Raises CorruptObjectError, StoreError.
        """
        log = cls(store, run)
        log._begin(reason)
        return log

    @property
    def attempt(self) -> int:
        """Number of this driver's attempt."""
        return self._mine

    def renew(self, reason: str) -> int:
        """Becomes the next attempt again and returns its number: for a learner group that starts anew in this driver.

        What it publishes then has versions of its own, and nothing of the former attempt is overwritten.
        Raises FencedError.
        """
        with self._lock:
            self._mine = self._append("attempt", self._mine + 1, self._attempt_payload(reason)).attempt
        return self._mine

    def append(self, kind: str, payload: Mapping[str, Any]) -> Entry:
        """Commits an entry: it exists when this returns.

        After an error that leaves the outcome open (RetryableError, StoreError) the same call may be made again; it
        commits once. Raises FencedError where another attempt has taken over, and StoreError where the entry
        contradicts the log (a second batch of an iteration). NaN and infinities in ``payload`` are kept as the
        strings ``"nan"``, ``"inf"`` and ``"-inf"``.
        """
        if kind not in KINDS or kind == "attempt":
            known = ", ".join(sorted(KINDS - {"attempt"}))
            raise StoreError(f"a driver cannot append a log entry of kind {kind!r}: use one of {known}")
        with self._lock:
            return self._append(kind, self._mine, plain(payload))

    def commit_batch(self, manifest: BatchManifest) -> Entry:
        """Commits the batch of the next iteration, its objects flushed. Raises FencedError, StoreError."""
        return self._commit("batch", manifest)

    def commit_weights(self, record: WeightsRecord) -> Entry:
        """Commits a policy version; a no-op where it is the newest already. Raises FencedError, StoreError."""
        latest = self.latest("weights")
        if latest is not None and self.latest_weights() == record:
            return latest
        return self._commit("weights", record)

    def commit_checkpoint(self, record: CheckpointRecord) -> Entry:
        """Commits a learner state. Raises FencedError, StoreError."""
        return self._commit("checkpoint", record)

    def finish(self, payload: Mapping[str, Any], model: Sequence[ObjectRef] = ()) -> Entry:
        """Commits that the run has reached its end, with ``model`` as its result.

        ``payload`` and, under ``model``, the references are what ``finished`` returns. Raises FencedError, StoreError.
        """
        self._store.flush(ref.key for ref in model)
        return self.append("finished", {**payload, "model": model})

    def check_fence(self) -> None:
        """Raises FencedError where another attempt has taken over: before anything is put under a name that all use."""
        with self._lock:
            found = self._read(self._next)
            if found is not None:
                self._meet(found)

    def _commit(self, kind: str, record: BatchManifest | WeightsRecord | CheckpointRecord) -> Entry:
        self._store.flush(ref.key for ref in object_refs(record))
        return self.append(kind, to_json(record))

    def _append(self, kind: str, attempt: int, payload: Json) -> Entry:
        nonce = uuid.uuid4().hex
        while True:
            entry = make_entry(self._next, kind, attempt, nonce, self._prev, payload)
            landed = self._landed(entry)
            if landed is not None:
                return landed
            if self._lineage.attempt != self._mine:  # somebody else's entry was taken in by refresh()
                raise self._fenced(self._lineage.entries[-1])
            self._check(entry)
            found = self._create(entry)
            if found is None:
                self._lineage.apply(entry, self._place(entry.seq))
                return entry
            self._meet(found)

    def _begin(self, reason: str) -> None:
        """Appends the first entry of this attempt, behind whatever others append meanwhile."""
        nonce = uuid.uuid4().hex
        while True:
            payload = self._attempt_payload(reason)
            if self._torn:
                payload["voided"] = list(self._torn)
            entry = make_entry(self._next, "attempt", self._lineage.attempt + 1, nonce, self._prev, payload)
            if self._create(entry) is None:
                break
            self.refresh()
        self._take_in(entry)
        self._mine = entry.attempt

    @staticmethod
    def _attempt_payload(reason: str) -> Json:
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"reason": reason, "host": socket.gethostname(), "pid": os.getpid(), "since": since}

    def _create(self, entry: Entry) -> Entry | None:
        """Creates the entry; None where that holds now, the slot's present entry where another one has it."""
        data = entry_bytes(entry)
        key = self._layout.log_entry(entry.seq)
        self._open.add(entry.nonce)
        for left in reversed(range(TRIES)):
            try:
                self._store.put(key, data, if_absent=True)
                break
            except ObjectExistsError:
                found = parse_entry(self._store.get(key), entry.seq, self._place(entry.seq))
                if found.nonce == entry.nonce:
                    break
                self._open.discard(entry.nonce)
                return found
            except RetryableError as error:
                if not left:
                    raise
                time.sleep(error.delay_s)
        self._open.discard(entry.nonce)
        return None

    def _meet(self, found: Entry) -> None:
        """Takes in an own entry whose answer was lost. Raises FencedError for anybody else's."""
        if found.nonce not in self._open:
            raise self._fenced(found)
        self._open.discard(found.nonce)
        self._take_in(found)

    def _fenced(self, found: Entry) -> FencedError:
        latest = LogView(self._store, self.run).holder()
        return FencedError(
            f"run {self.run!r} in {self._store.uri} was taken over: entry {found.seq} of its log is of attempt "
            f"{found.attempt}, and now {latest} has it; this is attempt {self._mine} (pid {os.getpid()}), which must "
            f"stop: nothing committed is lost, the files under '{self._layout.metrics_prefix}' show how the new one "
            "gets on, and starting again with --take-over takes the run back"
        )

    def _landed(self, entry: Entry) -> Entry | None:
        """The entry of an earlier call with the same content that landed although the call failed."""
        last = self._lineage.entries[-1]
        same = last.kind == entry.kind and last.attempt == entry.attempt
        return last if same and (entry.kind == "attempt" or last.payload == entry.payload) else None

    def _check(self, entry: Entry) -> None:
        """Raises StoreError where the entry contradicts the log; tried on the state's copy, so nothing changes."""
        state = self._lineage
        trial = Lineage(
            attempt=state.attempt,
            batches=list(state.batches),
            weights=dict(state.weights),
            checkpoints=list(state.checkpoints),
            finished=state.finished,
            published=dict(state.published),
        )
        trial.apply(entry, self._place(entry.seq))


def make_entry(seq: int, kind: str, attempt: int, nonce: str, prev: str, payload: Json) -> Entry:
    """An entry with its checksum; NaN and infinities in the payload become strings. Raises TypeError."""
    parsed = loads(dumps(plain(payload)), "the payload")
    entry = Entry(seq=seq, kind=kind, attempt=attempt, nonce=nonce, prev=prev, payload=parsed, checksum="")
    checksum = xxhash.xxh3_128_hexdigest(dumps(_body(entry)))
    return Entry(seq=seq, kind=kind, attempt=attempt, nonce=nonce, prev=prev, payload=parsed, checksum=checksum)


def entry_bytes(entry: Entry) -> bytes:
    """The entry as it is stored: one JSON object."""
    return dumps({**_body(entry), "xxh3": entry.checksum})


def parse_entry(data: bytes | memoryview, seq: int, place: str) -> Entry:
    """The entry number ``seq`` in ``data``.

    Raises:
        CorruptObjectError: it is torn, damaged or another one.
        StoreError: it is whole, but of a kind or format of a later version.
    """
    body = loads(data, place)
    checksum = body.pop("xxh3", "")
    if xxhash.xxh3_128_hexdigest(dumps(body)) != checksum or body.keys() != _FIELDS or body["seq"] != seq:
        raise CorruptObjectError(f"{place} does not match its checksum: it was damaged after it was written")
    if body["format"] != FORMAT or body["kind"] not in KINDS:
        raise StoreError(
            f"{place} is of format {body['format']} and kind {body['kind']!r}, which this version does not know: "
            "use the version of Steadyhelm that wrote it"
        )
    return Entry(checksum=checksum, **{name: body[name] for name in _FIELDS - {"format"}})


def _body(entry: Entry) -> Json:
    return {
        "format": FORMAT,
        "seq": entry.seq,
        "kind": entry.kind,
        "attempt": entry.attempt,
        "nonce": entry.nonce,
        "prev": entry.prev,
        "payload": entry.payload,
    }
