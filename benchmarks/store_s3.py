"""The batch plane on S3 against a bare parallel boto3 client on the same server.

Bare means: the very bytes of the encoded shards, ``put_object`` and ``get_object`` of one boto3 client with its
defaults from as many threads, and boto3's own parallel transfer for large objects; no checksum of ours, no conditions.
Plane and bare client take turns, each on objects of its own; the figure is the ratio of their times. The last row is of
a whole run over that server: how much of an iteration the learner waits for its batch's objects and for micro-batches
made of them, how much of a batch it had read before that was committed, and how long an iteration takes, since what is
read ahead is read on the engines' cores.

The server is the one that STEADYHELM_TEST_S3_ENDPOINT names (bucket STEADYHELM_TEST_S3_BUCKET), otherwise versitygw on
this machine, which then shares its cores with both clients.
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from batch_plane import DIGITS, R1_REWARD, alternate, shard
from botocore.config import Config
from overhead import iterations
from steadyhelm.data.types import ObjectRef
from steadyhelm.store import LocalStore, ObjectStore, open_store
from steadyhelm.store.codec import decode_rollout, encode_rollout
from steadyhelm.telemetry import metrics as names
from steadyhelm.testing.s3_server import CREDENTIALS, ONE_AT_A_TIME, make_bucket, s3_server
from table import Row, main

THREADS = 8
"""Shards that are on their way at a time, on both sides."""
SHARDS = 16
"""Shards of a batch."""
LARGE_BYTES = 64 << 20
"""Size of a large object, as weights and checkpoints have them."""
GOAL = 0.70
RUN_ROLLOUTS = 256
RUN_ITERATIONS = 21
INPUT_GOAL = 0.01
VERSITYGW = Path(__file__).resolve().parents[1] / ".ci" / "versitygw"


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, str]]:
    """Endpoint and bucket of the server to measure on. Raises SystemExit, with the reason, where there is none."""
    bucket = os.environ.get("STEADYHELM_TEST_S3_BUCKET", "steadyhelm-test")
    given = os.environ.get("STEADYHELM_TEST_S3_ENDPOINT")
    if given:
        make_bucket(given, bucket)
        yield given, bucket
        return
    built = subprocess.run([VERSITYGW], capture_output=True, text=True)
    if built.returncode:
        print(f"not measured: {built.stderr.strip()}")
        raise SystemExit(0 if built.returncode == 3 else 1)
    os.environ.update(CREDENTIALS)
    with s3_server(Path(built.stdout.strip()), folder / "buckets", *ONE_AT_A_TIME) as endpoint:
        make_bucket(endpoint, bucket)
        yield endpoint, bucket


class Bare:
    """A boto3 client, with its defaults, in ``THREADS`` threads."""

    def __init__(self, endpoint: str, bucket: str, prefix: str) -> None:
        config = Config(max_pool_connections=THREADS, s3={"addressing_style": "path"})
        self._client: Any = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
        self._bucket = bucket
        self._prefix = prefix

    def put(self, name: str, data: bytes) -> None:
        """One request."""
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}", Body=data)

    def get(self, name: str) -> bytes:
        """One request."""
        data: bytes = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}")["Body"].read()
        return data

    def upload(self, name: str, data: bytes) -> None:
        """Parts side by side, as boto3 does it."""
        self._client.upload_fileobj(io.BytesIO(data), self._bucket, f"{self._prefix}/{name}")

    def download(self, name: str) -> io.BytesIO:
        """Ranges side by side, as boto3 does it."""
        target = io.BytesIO()
        self._client.download_fileobj(self._bucket, f"{self._prefix}/{name}", target)
        return target


class Exchange:
    """A batch of equal shards, through the plane and through the bare client."""

    def __init__(self, store: ObjectStore, bare: Bare, threads: ThreadPoolExecutor, spec: Any) -> None:
        self.name: str = spec[0]
        self._store, self._bare, self._threads = store, bare, threads
        with tempfile.TemporaryDirectory() as images:
            self._rows = shard(LocalStore(Path(images)), *spec)
        self._parts = encode_rollout(self._rows)
        self._data = b"".join(self._parts)
        self.megabytes = SHARDS * len(self._data) / 1e6
        self._refs = [store.put(self._key("read", n), self._parts) for n in range(SHARDS)]
        for number in range(SHARDS):
            bare.put(self._key("read", number), self._data)

    def _key(self, turn: object, number: int) -> str:
        return f"run/batches/{self.name}-{turn}/{number}.rollout"

    def _each(self, call: Callable[[int], Any]) -> list[Any]:
        return list(self._threads.map(call, range(SHARDS)))

    def put(self, turn: int) -> list[ObjectRef]:
        """Creates the batch's shards, each once."""
        return self._each(lambda n: self._store.put(self._key(turn, n), self._parts, if_absent=True))

    def read(self, _: int) -> None:
        """Reads and verifies them."""
        self._each(lambda n: self._store.read(self._refs[n]))

    def exchange(self, turn: int) -> None:
        """What an iteration does: encodes, puts, makes sure of all, reads, verifies and decodes."""
        key = f"x{turn}"
        put = self._each(lambda n: self._store.put(self._key(key, n), encode_rollout(self._rows), if_absent=True))
        self._store.flush(ref.key for ref in put)
        self._each(lambda n: decode_rollout(self._store.read(put[n])))

    def bare_put(self, turn: int) -> None:
        """The same bytes by the bare client."""
        self._each(lambda n: self._bare.put(self._key(turn, n), self._data))

    def bare_read(self, _: int) -> None:
        """The same bytes by the bare client."""
        self._each(lambda n: self._bare.get(self._key("read", n)))

    def bare_exchange(self, turn: int) -> None:
        """The same bytes there and back by the bare client."""
        self._each(lambda n: self._bare.put(self._key(f"x{turn}", n), self._data))
        self._each(lambda n: self._bare.get(self._key(f"x{turn}", n)))

    def rows(self, turns: int, goal: float | None) -> list[Row]:
        """Ratios and the plane's own speed."""
        size = f"{self.name}, {SHARDS} shards of {len(self._data) / 1e3:.0f} kB"
        pairs = {
            "put / bare": (self.put, self.bare_put, self.megabytes),
            "read / bare": (self.read, self.bare_read, self.megabytes),
            "encode, put, flush, read, decode / bare put, get": (
                self.exchange,
                self.bare_exchange,
                2 * self.megabytes,
            ),
        }
        return [row for label, pair in pairs.items() for row in compare(f"{size}: {label}", *pair, turns, goal)]


def compare(
    label: str,
    plane: Callable[[int], object],
    bare: Callable[[int], object],
    megabytes: float,
    turns: int,
    goal: float | None,
) -> list[Row]:
    """The ratio of both, and the plane's speed."""
    ours, theirs = alternate(plane, bare, turns, lambda _: None)
    name = label.split(" /")[0]
    return [
        Row(name=label, value=theirs / ours, unit="ratio", goal=goal, better="higher"),
        Row(name=name, value=megabytes / ours, unit="MB/s", goal=None, better="higher"),
    ]


def large(store: ObjectStore, bare: Bare, turns: int) -> list[Row]:
    """One large object in parts, against boto3's own transfer."""
    data = np.random.default_rng(0).bytes(LARGE_BYTES)
    ref = store.put("run/weights/read", data)
    bare.upload("large/read", data)
    label = f"one object of {LARGE_BYTES >> 20} MiB"
    megabytes = LARGE_BYTES / 1e6

    def put(turn: int) -> None:
        store.put(f"run/weights/{turn % 2}", data)

    def upload(turn: int) -> None:
        bare.upload(f"large/{turn % 2}", data)

    return [
        *compare(f"{label}: put / boto3's transfer", put, upload, megabytes, turns, GOAL),
        *compare(
            f"{label}: read / boto3's transfer",
            lambda _: store.read(ref),
            lambda _: bare.download("large/read"),
            megabytes,
            turns,
            GOAL,
        ),
    ]


def input_wait(uri: str) -> list[Row]:
    """The learner's wait for what it steps on, in a run of the digits task whose store is ``uri``."""
    found = iterations(uri, RUN_ROLLOUTS, RUN_ROLLOUTS // 2, RUN_ITERATIONS)
    wait, ahead, seconds = (
        statistics.median(line[name] for line in found)
        for name in (names.INPUT_WAIT, names.PREFETCHED, names.ITERATION_SECONDS)
    )
    of = f"an iteration of {RUN_ROLLOUTS} rollouts"
    return [
        Row(name=f"the learner's wait for its input / {of}", value=wait, unit="ratio", goal=INPUT_GOAL, better="lower"),
        Row(
            name="read before the batch was committed / the batch",
            value=ahead,
            unit="ratio",
            goal=None,
            better="higher",
        ),
        Row(name=of, value=seconds, unit="s", goal=None, better="lower"),
    ]


def measure(quick: bool) -> Sequence[Row]:
    """The rows of both kinds of shard and of a large object; unless ``quick``, of a whole run.

    The goal is for shards of R1-Reward's size, codec included, and for large objects. What takes the time with shards
    of the digits run is the request; they have no goal.
    """
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        server(Path(folder)) as (endpoint, bucket),
        ThreadPoolExecutor(THREADS) as threads,
    ):
        prefix = uuid.uuid4().hex
        store = open_store(f"s3://{bucket}/{prefix}-plane?endpoint={endpoint}")
        bare = Bare(endpoint, bucket, f"{prefix}-bare")
        turns = 10 if quick else 60
        return [
            *Exchange(store, bare, threads, R1_REWARD).rows(turns, GOAL),
            *large(store, bare, max(turns // 3, 4)),
            *Exchange(store, bare, threads, DIGITS).rows(turns, None),
            *([] if quick else input_wait(f"s3://{bucket}/{prefix}-run?endpoint={endpoint}")),
        ]


if __name__ == "__main__":
    main("Batches through the plane on S3 against a bare parallel boto3 client on the same server.", measure)
