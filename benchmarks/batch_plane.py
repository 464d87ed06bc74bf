"""The batch plane against raw files: what encoding, checksums and atomic puts cost, and how small shards are.

Raw files mean: the very bytes of the encoded shard, joined beforehand, written to a new file or read from one, and the
same xxh3-128 over them. Plane and raw take turns, each on files of its own; the figure is the ratio of their times.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from steadyhelm.data.types import FinishReason, Prompt, PromptId, Trajectory
from steadyhelm.store import LocalStore
from steadyhelm.store.codec import decode_rollout, encode_rollout
from steadyhelm.store.images import put_image
from table import Row, main

DIGITS = ("digits", 32, 130, 36, 480)
R1_REWARD = ("r1-reward", 128, 1800, 600, 152_000)
"""Name, trajectories of a shard, prompt tokens, completion tokens, vocabulary."""
WINDOW = 8
"""Files of each side that exist at a time."""


def shard(store: LocalStore, name: str, num: int, prompt: int, completion: int, vocab: int) -> list[Trajectory]:
    """Trajectories of one version, each with its own image and prompt; texts of 4 characters a token."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num):
        length = int(rng.integers(completion // 2, completion + 1))
        letters = rng.integers(97, 123, size=4 * (prompt + length), dtype=np.uint8).tobytes().decode()
        rows.append(
            Trajectory(
                prompt=Prompt(
                    prompt_id=PromptId(f"0:{index}"),
                    group_id=f"0:{index}",
                    text=letters[: 4 * prompt],
                    images=(put_image(store, f"{name} {index}".encode()),),
                    label=1 + index % 2,
                    swapped=index % 3 == 0,
                    seed=int(rng.integers(2**63)),
                    pair_id=f"train-{index}",
                ),
                prompt_tokens=rng.integers(vocab, size=prompt, dtype=np.int32),
                tokens=rng.integers(vocab, size=length, dtype=np.int32),
                logprobs=-rng.random(length, dtype=np.float32),
                versions=np.full(length, 11, np.int32),
                attempt=1,
                finish=FinishReason.STOP,
                completion_text=letters[4 * prompt :],
            )
        )
    return rows


def information(rows: Sequence[Trajectory], vocab: int) -> int:
    """Bytes of the bare columns: ids in the bytes that the vocabulary needs, float32 log-probs, UTF-8 texts, hashes.

    Left out as next to nothing: versions, labels, flags, lengths. Those and all framing are the shard's overhead.
    """
    token_bytes = 2 if vocab <= 1 << 16 else 4
    total = 0
    for row in rows:
        texts = (row.prompt.text, row.completion_text, row.prompt.prompt_id, row.prompt.pair_id)
        total += token_bytes * (len(row.prompt_tokens) + len(row.tokens)) + 4 * len(row.logprobs)
        total += sum(len(text.encode()) for text in texts) + 8 + 32 * len(row.prompt.images)
    return total


def alternate(
    first: Callable[[int], object], second: Callable[[int], object], turns: int, before: Callable[[int], None]
) -> tuple[float, float]:
    """Seconds of each, called in turns with the turn's number; which one goes first alternates too.

    The lowest decile of the turns: calls of less than a millisecond that another process interrupts say nothing.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        before(turn)
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            (first, second)[which](turn)
            times[which].append(time.perf_counter() - started)
    return statistics.quantiles(times[0], n=10)[0], statistics.quantiles(times[1], n=10)[0]


def raw_write(path: Path, data: bytes) -> str:
    """Writes a new file and returns its checksum."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return xxhash.xxh3_128_hexdigest(data)


def raw_read(path: Path) -> str:
    """Reads a file and returns its checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    return xxhash.xxh3_128_hexdigest(data)


def compare(folder: Path, spec: tuple[str, int, int, int, int], turns: int, goal: float | None) -> list[Row]:
    """The rows of one kind of shard; ``goal`` is that of the ratios to raw files."""
    name, num, prompt, completion, vocab = spec
    store = LocalStore(folder / "store")
    rows = shard(store, name, num, prompt, completion, vocab)
    parts = encode_rollout(rows)
    data = b"".join(parts)
    ref = store.put(f"run/batches/{name}/read.rollout", data)
    raw = folder / name
    raw.mkdir()
    raw_write(raw / "read", data)

    def key(turn: int) -> str:
        return f"run/batches/{name}/{turn % WINDOW}.rollout"

    def forget(turn: int) -> None:
        """Files older than the window go, so that both sides write to pages that were in use before."""
        store.delete(key(turn))
        (raw / f"{turn % WINDOW}").unlink(missing_ok=True)

    def write(turn: int) -> str:
        return raw_write(raw / f"{turn % WINDOW}", data)

    def read(_: int) -> str:
        return raw_read(raw / "read")

    ratios = {
        "put / raw write": (lambda turn: store.put(key(turn), parts), write, goal),
        "encode + put / raw write": (lambda turn: store.put(key(turn), encode_rollout(rows)), write, goal),
        "get / raw read": (lambda _: store.read(ref), read, goal),
        "get + decode / raw read": (lambda _: decode_rollout(store.read(ref)), read, goal),
        "get + decode + objects / raw read": (lambda _: decode_rollout(store.read(ref)).trajectories, read, None),
    }
    table = []
    for label, (plane, bare, wanted) in ratios.items():
        ours, theirs = alternate(plane, bare, turns, forget)
        table.append(Row(name=f"{name}: {label}", value=theirs / ours, unit="ratio", goal=wanted, better="higher"))
        table.append(
            Row(name=f"{name}: {label.split(' /')[0]}", value=ours * 1e3, unit="ms", goal=None, better="lower")
        )
    share = len(data) / information(rows, vocab)
    table.append(Row(name=f"{name}: bytes / information", value=share, unit="ratio", goal=1.25, better="lower"))
    size = len(data) / num
    table.append(Row(name=f"{name}: bytes per trajectory", value=size, unit="bytes", goal=None, better="lower"))
    return table


def measure(quick: bool) -> list[Row]:
    """The rows of both kinds of shard, in a folder on the disk that the working directory is on.

    The goal is for the large shard: for put and get of the same bytes, and for both with the codec. Making bytes of
    Python objects takes longer than copying them into the page cache, so encoding misses it; its row in milliseconds
    says what it costs. A shard of the digits run has 37 kB; what takes the time there is fixed, so its ratios have no
    goal. Trajectories as objects are made at first use, behind ``get + decode``; they have a row of their own.
    """
    turns = 100 if quick else 500
    with tempfile.TemporaryDirectory(dir=".") as folder:
        small = compare(Path(folder), DIGITS, turns, None)
        return [*compare(Path(folder), R1_REWARD, turns, 0.70), *small]


if __name__ == "__main__":
    main("Shards through the batch plane against raw files of the same bytes with the same checksum.", measure)
