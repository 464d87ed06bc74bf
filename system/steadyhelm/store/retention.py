"""What of a run can go: objects that no manifest, no resume and no subscriber of weights can need.

==================  ===================================================================================================
folder              stays
==================  ===================================================================================================
batches             what a committed batch names; what belongs to an iteration without one
checkpoints         the newest committed ones
weights             the newest committed ones of the surviving lineage, with the chain of deltas back to their anchor
eval                what belongs to a committed evaluation, or to the newest attempt
probe               nothing
all else            everything: the log, metrics, reports, models, images (which runs share), files of other origin
==================  ===================================================================================================

Nothing here needs a lock to be safe. An object that no entry names goes only where none ever can: its iteration has
its batch, or its attempt has been taken over. What the log has replaced by something newer is not read any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

from steadyhelm.config import RunFile
from steadyhelm.data.types import BatchManifest, CheckpointRecord, PolicyVersion, WeightsRecord
from steadyhelm.errors import StoreError
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.liveness import held
from steadyhelm.store.log import LogView
from steadyhelm.store.records import from_json, object_refs
from steadyhelm.telemetry import EventSink

Folder = Literal["batches", "checkpoints", "weights", "eval", "probe"]
"""A folder of a run in which something can go."""
FOLDERS: tuple[Folder, ...] = get_args(Folder)
REPLACED: tuple[Folder, ...] = ("checkpoints", "weights")
"""Where a run in progress leaves more and more behind; the other folders keep nearly everything."""
SUBSCRIBERS_LAG = 2
"""Policy versions that stay beyond those that ``max_staleness`` lets rollouts use: the newest, and the one before, for
whoever is just fetching it."""
DELETES = 16
"""Objects that are deleted at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How many of the newest ``checkpoints`` and ``weights`` stay; 0 checkpoints: all of both.

    Example: ``Keep(checkpoints=2, weights=2)``
    """

    checkpoints: int
    weights: int

    @classmethod
    def of(cls, run: RunFile) -> Keep:
        """What the run file asks for."""
        return cls(checkpoints=run.schedule.keep_checkpoints, weights=run.schedule.max_staleness + SUBSCRIBERS_LAG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unneeded:
    """An object that can go. Example: ``Unneeded(key="digits/weights/000003.1/anchor-0000…", why="newer weights")``."""

    key: str
    why: str


def unneeded(store: ObjectStore, log: LogView, keep: Keep, folders: Sequence[Folder] = FOLDERS) -> Iterator[Unneeded]:
    """The objects of the log's run that can go, folder by folder; nothing is deleted.

    Raises ObjectMissingError, before the first, where an object that a resume or a subscriber needs is not there: then
    older ones may be what is left to go on from.
    """
    needs = _Needs(log, keep)
    store.flush(sorted(needs.live))
    for folder in folders:
        for key in store.list(f"{log.run}/{folder}/"):
            why = needs.why_not(folder, key)
            if why:
                yield Unneeded(key=key, why=why)


def remove(store: ObjectStore, found: Iterable[Unneeded]) -> int:
    """Deletes the objects and returns how many they were. Raises StoreError; it may be called again."""
    with ThreadPoolExecutor(DELETES, "steadyhelm-gc") as threads:
        return sum(1 for _ in threads.map(lambda item: store.delete(item.key), found))


def collect(store: ObjectStore, run: str, tell: EventSink, *, dry_run: bool = False) -> tuple[Unneeded, ...]:
    """Deletes what of a run that nobody drives can go, unfinished uploads too; returns what that was.

    Args:
        store: the run's store.
        run: name of the run.
        tell: takes a notice where it has to wait whether a driver lives.
        dry_run: delete nothing, and ask nobody whether a driver lives.

    Raises:
        ConfigError: there is no such run.
        FatalError: a driver is at it.
        ObjectMissingError: what a resume needs is not all there; nothing was deleted.
    """
    keep = Keep.of(RunFile.model_validate(LogView(store, run).run_record()["run"]))
    with nullcontext() if dry_run else held(store, run, tell=tell):
        found = list(unneeded(store, LogView(store, run), keep))
        if not dry_run:
            remove(store, found)
        uploads = store.sweep(f"{run}/", dry_run=dry_run)
    return (*found, *(Unneeded(key=key, why="an upload that was never finished") for key in uploads))


class _Needs:
    """What the log names, and what of that is still read: ``live`` are the checkpoints and weights that stay."""

    def __init__(self, log: LogView, keep: Keep) -> None:
        self._layout = RunLayout(log.run)
        self._attempt = log.attempt
        self._last_iteration = log.last_iteration
        self._in_batches = _keys(log.batches())
        self._evaluations: set[tuple[int, int]] = set()
        checkpoints: dict[PolicyVersion, CheckpointRecord] = {}
        weights: dict[PolicyVersion, WeightsRecord] = {}
        for entry in log.entries:
            place = f"entry {entry.seq} of {log.run}"
            if entry.kind == "checkpoint":
                saved = from_json(CheckpointRecord, entry.payload, place)
                checkpoints.pop(saved.version, None)  # one that is committed again is the newest again
                checkpoints[saved.version] = saved
            elif entry.kind == "weights":
                published = from_json(WeightsRecord, entry.payload, place)
                weights[published.version] = published
            elif entry.kind == "eval":
                self._evaluations.add((int(entry.payload["iteration"]), int(entry.payload["attempt"])))
        newest = list(checkpoints.values())[-keep.checkpoints :]  # all of them where it is 0
        subscribed = _with_bases(log, weights, keep.weights if keep.checkpoints else len(weights))
        self.live = _keys(newest) | _keys(subscribed)
        self._named = _keys(checkpoints.values()) | _keys(weights.values())

    def why_not(self, folder: Folder, key: str) -> str:
        """Why nobody needs the object; empty where somebody may, or where its name is none of ours."""
        if folder == "probe":
            return "left by a race at a start"
        if key in self.live or key in self._in_batches:
            return ""
        try:
            if folder in REPLACED:
                return self._replaced(folder, key, self._layout.parse_version(key).attempt)
            name = self._layout.parse_shard(key)
        except StoreError:
            return ""
        if folder == "eval":
            kept = (name.iteration, name.attempt) in self._evaluations
            return "" if kept else self._abandoned(name.attempt)
        return f"not in the batch of iteration {name.iteration}" if name.iteration <= self._last_iteration else ""

    def _replaced(self, folder: Folder, key: str, attempt: int) -> str:
        return f"replaced by newer {folder}" if key in self._named else self._abandoned(attempt)

    def _abandoned(self, attempt: int) -> str:
        return f"left by attempt {attempt}, which was taken over" if attempt < self._attempt else ""


def _keys(records: Iterable[BatchManifest | CheckpointRecord | WeightsRecord]) -> set[str]:
    """The objects of the records."""
    return {ref.key for record in records for ref in object_refs(record)}


def _with_bases(log: LogView, known: Mapping[PolicyVersion, WeightsRecord], count: int) -> list[WeightsRecord]:
    """The newest ``count`` weights of the surviving lineage, and all that they are deltas to."""
    latest = log.latest_weights()
    if latest is None:
        return []
    lineage = (log.weights(iteration) for iteration in range(latest.version.iteration, -1, -1))
    found = [record for record in lineage if record is not None][:count]
    for record in found:  # which grows meanwhile
        base = known.get(record.base) if record.base else None
        if base is not None and base not in found:
            found.append(base)
    return found
