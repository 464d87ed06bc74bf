"""Weights through the memory of one machine: a safetensors file that the learner's ranks write and all engines map.

::

    rank 0 ─┐                                                        ┌─ map, verify ─ engine 0
    rank 1 ─┼─ write ─► <memory>/steadyhelm-weights-<random>/7.1-3 ──┼─ map, verify ─ engine 1
    rank 2 ─┘                                                        └─ link ─ engine server
       └──────── <key>/local.json in the store: machine and path ────────► …

A file that has its name in the store is never written again: what has it mapped keeps it, however many versions later.
Names of the last two stay, for engines that start meanwhile. They go away with the learner where it ends in order. Of a
learner that was killed they stay until another one on this machine publishes for the second time, so that an engine
which starts while the learner does still finds what the others serve. A learner that starts publishes anew.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import xxhash

from steadyhelm.data.types import PolicyVersion, WeightsRecord
from steadyhelm.errors import ConfigError, CorruptObjectError, ObjectMissingError, ResourceError
from steadyhelm.store import ObjectStore
from steadyhelm.store.memory import SHARED, memory_folder
from steadyhelm.weights import codec
from steadyhelm.weights.checksum import combined, digest, in_threads, require_checksum, set_checksum
from steadyhelm.weights.layout import Block, Layout, flat_words
from steadyhelm.weights.notice import announce, read_notice
from steadyhelm.weights.share import Share

KEPT = 2
"""Files that have names at one time, the one that is being written included."""
ROOM = 3
"""Versions that memory has to hold: those, and one that a late engine still serves."""
PREFIX = "steadyhelm-weights-"
"""How the names of publishers' folders begin; each holds a file ``lock`` that its living owner has locked."""
FOLDERS = (SHARED, Path(tempfile.gettempdir()))
"""Where they can be."""
LINE_BYTES = 64
"""A processor's cache line, and what its wide instructions load at once."""
_UNLOCKED = "steadyhelm-starting-"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_REMEDY = "set weights.type to 'store'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Where a version lies. Example: ``Notice(machine="0b1f…", path="/dev/shm/steadyhelm-weights-x1/7.1-3")``."""

    machine: str
    path: str


class MappedTensors(dict[str, torch.Tensor]):
    """Tensors by name that are views of the safetensors file at ``path``, mapped; writing to them changes no file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], path: Path, buffer: memoryview) -> None:
        super().__init__(tensors)
        self.path = path
        self._buffer = buffer

    def link(self, target: Path) -> str | None:
        """Gives the file the name ``target`` too; its xxh3-128 in hex, or None where the file system cannot do that."""
        try:
            os.link(self.path, target)
        except OSError:
            return None
        return xxhash.xxh3_128_hexdigest(self._buffer)


class LocalWeights:
    """Publishes versions as files in shared memory, and maps them. One call at a time.

    Args:
        store: where notices are put and read.
        threads: blocks that are worked on at a time.
        share: this publisher's part, whose ranks are all on one machine; None for all of whatever is published.
    """

    def __init__(self, store: ObjectStore, *, threads: int = 1, share: Share | None = None) -> None:
        self._store = store
        self._threads = threads
        self._share = share
        self._folder: _Folder | None = None

    def publish(
        self,
        version: PolicyVersion,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        known: WeightsRecord | None = None,
    ) -> WeightsRecord:
        """Writes ``tensors`` to shared memory, and a notice of it under ``key``.

        ``known`` is the version of a learner that is gone, and its file may be gone any moment: it is never adopted.

        Raises:
            ResourceError: there is no room.
            ConfigError: the ranks are on several machines.
            StoreError: the notice could not be put.
        """
        share = self._share or Share(layout=Layout.of(tensors))
        begun = [json.loads(told) for told in share.exchange(lambda: self._begin(version, share))]
        if len({answer["machine"] for answer in begun}) > 1:
            raise ConfigError(f"weights.type is 'local', but the learner's ranks are on several machines: {_REMEDY}")
        path = Path(begun[0]["path"])
        digests = share.exchange(lambda: self._write(path, share, tensors))
        checksum = combined(share.layout, bytes.fromhex("".join(digests)))
        notice = Notice(machine=this_machine(), path=str(path))
        return announce(self._store, share, f"{key}/local.json", notice, version, checksum)

    def fetch(self, record: WeightsRecord) -> MappedTensors:
        """The tensors of ``record``, verified as a whole against its checksum; nothing is copied.

        Raises:
            ObjectMissingError: the file is gone, or lies in another container's memory.
            ConfigError: it lies on another machine.
            CorruptObjectError: it is not what ``record`` says.
        """
        notice = read_notice(Notice, self._store, record, "in shared memory")
        if notice.machine != this_machine():
            raise ConfigError(
                f"weights.type is 'local', but the learner that published weights {record.version} and this engine "
                f"are on different machines: {_REMEDY}"
            )
        path = Path(notice.path)
        try:
            with path.open("rb") as file:
                buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except (FileNotFoundError, PermissionError) as error:
            raise ObjectMissingError(
                f"weights {record.version} are not at {path}: their learner has ended and publishes anew when it "
                f"starts again; where it has not, it has shared memory of its own: {_REMEDY}"
            ) from error
        except ValueError as error:
            raise CorruptObjectError(f"{path} is empty, but should hold weights {record.version}") from error
        tensors, _ = codec.decode(buffer, str(path), copy=False)
        require_checksum(set_checksum(tensors, self._threads), record)
        return MappedTensors(tensors, path, buffer)

    def close(self) -> None:
        """Removes the files' names; what has them mapped keeps them."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _begin(self, version: PolicyVersion, share: Share) -> str:
        """This rank's machine; and of rank 0's the path of an empty file of the right size."""
        if share.index:
            return json.dumps({"machine": this_machine()})
        head, _ = _header(share.layout)
        size = len(head) + sum(block.num_bytes for block in share.layout.blocks)
        with _reported(size):
            if self._folder is None:
                self._folder = _Folder(size)
            path = self._folder.next(str(version))
            with path.open("xb") as file:
                file.write(head)
                file.truncate(size)
        return json.dumps({"machine": this_machine(), "path": str(path)})

    def _write(self, path: Path, share: Share, tensors: Mapping[str, torch.Tensor]) -> str:
        """Writes this rank's blocks into the file; their digests in hex, one behind the other."""
        _, begins = _header(share.layout)
        flat = {name: flat_words(tensors[name]) for name in share.names}

        def write(block: Block) -> bytes:
            views = block.views(flat)
            for (name, start, _), view in zip(block.segments, views, strict=True):
                _write_at(file, view.view(np.uint8).data, begins[name] + start * view.itemsize)
            return digest(views)

        with _reported(sum(block.num_bytes for block in share.layout.blocks)):
            file = os.open(path, os.O_WRONLY)
            try:
                return b"".join(in_threads(write, share.blocks, self._threads)).hex()
            finally:
                os.close(file)


class _Folder:
    """A publisher's folder, locked for as long as its process lives, whatever ends it.

    Args:
        num_bytes: size of a version.
    """

    def __init__(self, num_bytes: int) -> None:
        memory = memory_folder(ROOM * num_bytes // 2)  # which has room for so much twice
        made = Path(tempfile.mkdtemp(prefix=_UNLOCKED, dir=memory))
        self._lock = os.open(made / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._path = made.rename(memory / made.name.replace(_UNLOCKED, PREFIX, 1))  # only now others may see it
        self._serial = count()
        self._files: list[Path] = []

    def next(self, name: str) -> Path:
        """The path of a new file; older ones go, and from the second on what killed publishers have left."""
        if self._files:
            sweep()
        while len(self._files) >= KEPT:
            self._files.pop(0).unlink(missing_ok=True)
        self._files.append(self._path / f"{name}-{next(self._serial)}")
        return self._files[-1]

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._lock)


def sweep() -> None:
    """Removes what publishers on this machine have left that are no more."""
    for folder in (path for parent in FOLDERS for path in parent.glob(f"{PREFIX}*")):
        with suppress(OSError):  # it is somebody else's, or alive, or was removed meanwhile
            lock = os.open(folder / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def this_machine() -> str:
    """What tells this machine, since it was started, from all others."""
    return _BOOT.read_text().strip() if _BOOT.exists() else socket.gethostname()


def _header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """See ``codec.header``; wide types first, so that every tensor begins at a multiple of its elements' size.

    The first begins at a multiple of a cache line, and so do most others, whose sizes are multiples of one: a model
    computes with them where they are.
    """
    ordered = sorted(layout.specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    return codec.header(ordered, {"format": "pt"}, multiple=LINE_BYTES)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _reported(num_bytes: int) -> Iterator[None]:
    """OSErrors as ResourceErrors."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"weights of {num_bytes >> 20} MiB cannot be written to shared memory ({error}): give it room for "
            f"{ROOM} versions (--shm-size where this is a container), or {_REMEDY}"
        ) from error
