"""The batch plane against raw files: what encoding, checksums and atomic puts cost, and how small shards are.

Raw files mean: the very bytes of the encoded shard, joined beforehand, written to a new file or read from one, and the
same xxh3-128 over them. Plane and raw take turns, each on files of its own; the figure is the ratio of median times.
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
from table import Row, main

from steadyhelm.data.types import FinishReason, Prompt, PromptId, Trajectory
from steadyhelm.store import LocalStore
from steadyhelm.store.codec import decode_rollout, encode_rollout
from steadyhelm.store.images import put_image

DIGITS = ("digits", 32, 130, 36, 480)
R1_REWARD = ("7B", 128, 1800, 600, 152_000)
"""Name, trajectories of a shard, prompt tokens, completion tokens, vocabulary."""


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


def alternate(first: Callable[[int], object], second: Callable[[int], object], turns: int) -> tuple[float, float]:
    """Median seconds of each, called in turns with the turn's number; which one goes first alternates too."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            (first, second)[which](turn)
            times[which].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


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


def compare(folder: Path, spec: tuple[str, int, int, int, int], turns: int) -> list[Row]:
    """The rows of one kind of shard."""
    name, num, prompt, completion, vocab = spec
    store = LocalStore(folder / "store")
    rows = shard(store, name, num, prompt, completion, vocab)
    data = b"".join(encode_rollout(rows))
    refs = {}
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)

    def put(turn: int) -> None:
        refs[turn] = store.put(f"run/batches/{name}/{turn}.rollout", encode_rollout(rows))

    def get(turn: int) -> None:
        decode_rollout(store.read(refs[turn]))

    def get_all(turn: int) -> None:
        assert len(decode_rollout(store.read(refs[turn])).trajectories) == num

    plane_put, raw_put = alternate(put, lambda turn: raw_write(raw / f"{name}{turn}", data), turns)
    plane_get, raw_get = alternate(get, lambda turn: raw_read(raw / f"{name}{turn}"), turns)
    plane_all, raw_again = alternate(get_all, lambda turn: raw_read(raw / f"{name}{turn}"), turns)
    size = f"{name}, {num} trajectories, {len(data) / 1e6:.2f} MB"
    return [
        Row(name=f"put / raw write ({size})", value=raw_put / plane_put, unit="ratio", goal=0.70, better="higher"),
        Row(name=f"get / raw read ({size})", value=raw_get / plane_get, unit="ratio", goal=0.70, better="higher"),
        Row(
            name=f"get + objects / raw read ({name})",
            value=raw_again / plane_all,
            unit="ratio",
            goal=None,
            better="higher",
        ),
        Row(name=f"put ({name})", value=plane_put * 1e3, unit="ms", goal=None, better="lower"),
        Row(name=f"get ({name})", value=plane_get * 1e3, unit="ms", goal=None, better="lower"),
        Row(name=f"get + objects ({name})", value=plane_all * 1e3, unit="ms", goal=None, better="lower"),
        Row(
            name=f"bytes / information ({name})",
            value=len(data) / information(rows, vocab),
            unit="ratio",
            goal=1.25,
            better="lower",
        ),
        Row(name=f"bytes per trajectory ({name})", value=len(data) / num, unit="bytes", goal=None, better="lower"),
    ]


def measure(quick: bool) -> list[Row]:
    """The rows of both kinds of shard, in a folder on the disk that the working directory is on."""
    turns = 40 if quick else 200
    with tempfile.TemporaryDirectory(dir=".") as folder:
        return [row for spec in (DIGITS, R1_REWARD) for row in compare(Path(folder), spec, turns)]


if __name__ == "__main__":
    main("Shards through the batch plane against raw files of the same bytes with the same checksum.", measure)
