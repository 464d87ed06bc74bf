"""Large objects in parts: uploads whose parts go side by side, downloads of ranges straight into their places.

A part is a request of its own, with its own retries and deadline. A multipart upload becomes visible as a whole when
it is completed; one whose writer died stays invisible until ``S3Store.sweep`` aborts it.
"""

from __future__ import annotations

import base64
import contextlib
import time
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from http import HTTPStatus
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from steadyhelm.errors import StoreError
from steadyhelm.store.s3.requests import AgainError, Requests, code_of, field, status_of

T = TypeVar("T")
PART_BYTES = 8 << 20
"""Size of a part: large enough that its request costs little beside it, small enough to be sent within ``timeout_s``
on a slow line (a connection has that long for one body)."""
MULTIPART_BYTES = 2 * PART_BYTES
"""Size above which an object is transferred in parts."""
MAX_PARTS = 10_000
"""Parts of one upload: the limit of S3. Beyond 80 GB the parts grow."""
CHUNK_BYTES = 1 << 20
"""Bytes that are read before the clock is looked at again."""


class BeyondEndError(StoreError):
    """The object ends before the range that was asked for."""


class Transfer:
    """Transfers to and from one bucket; ``key`` is the full one there, ``name`` the store's, for messages."""

    def __init__(self, requests: Requests, bucket: str) -> None:
        self._requests = requests
        self._bucket = bucket

    def upload(self, key: str, name: str, views: Sequence[memoryview]) -> None:
        """Puts an object that consists of ``views``, in parts. Raises StoreError; nothing is visible then.

        An upload that the server knows no more was completed by a try whose answer was lost, or aborted by a sweep:
        which of the two cannot be seen from the object, so it is made once more, and the same bytes twice do no harm.
        """
        try:
            self._upload(key, name, views)
        except StoreError as error:
            if code_of(error.__cause__) != "NoSuchUpload":
                raise
            self._upload(key, name, views)

    def _upload(self, key: str, name: str, views: Sequence[memoryview]) -> None:
        run = partial(self._requests.run, "write", name)
        place = {"Bucket": self._bucket, "Key": key}
        started = run(lambda s3, _: s3.create_multipart_upload(**place, ChecksumAlgorithm="CRC32"))
        place["UploadId"] = field(started, "UploadId", name)
        ends = list(accumulate(view.nbytes for view in views))

        def put(number: int, span: tuple[int, int]) -> dict[str, Any]:
            body = _join(views, ends, *span)
            part = {"PartNumber": number, "ChecksumCRC32": crc32(body)}
            answer = run(lambda s3, _: s3.upload_part(**place, **part, Body=body))
            return {**part, "ETag": field(answer, "ETag", name)}

        try:
            parts = self._side_by_side([partial(put, *numbered) for numbered in enumerate(_spans(0, ends[-1]), 1)])
            run(lambda s3, _: s3.complete_multipart_upload(**place, MultipartUpload={"Parts": parts}))
        except BaseException:
            with contextlib.suppress(Exception):  # what ended the upload is what the caller has to read
                self._requests.connection.client.abort_multipart_upload(**place)
            raise

    def download(self, key: str, name: str, start: int, length: int, etag: str = "") -> memoryview:
        """Exactly the bytes ``[start, start + length)``, in a buffer of their own.

        With ``etag`` all of them are of that state of the object. Raises ObjectMissingError, StoreError.
        """
        # Not a bytearray, which would be filled with zeros first.
        buffer = np.empty(length, np.uint8).data
        condition = {"IfMatch": etag} if etag else {}

        def fetch(span: tuple[int, int]) -> None:
            into = buffer[span[0] - start : span[1] - start]
            asked = {"Bucket": self._bucket, "Key": key, "Range": f"bytes={span[0]}-{span[1] - 1}", **condition}
            self._requests.run("read", name, lambda s3, ends: _fetch(s3, asked, into, ends))

        self._side_by_side([partial(fetch, span) for span in _spans(start, length)])
        return buffer.toreadonly()

    def _side_by_side(self, calls: Sequence[partial[T]]) -> list[T]:
        """The calls' results; after the first failure no further call is begun, and all that run are waited for."""
        if len(calls) == 1:
            return [calls[0]()]
        threads = self._requests.connection.threads
        futures: list[Future[T]] = [threads.submit(call) for call in calls]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)


def _fetch(s3: Any, asked: dict[str, str], into: memoryview, ends: float) -> None:
    """Reads one range. Raises BeyondEndError, StoreError where the server ignores ranges."""
    from botocore.exceptions import ClientError

    beyond = BeyondEndError(f"object {asked['Key']!r} ends before {asked['Range']}: it is not the one that was meant")
    try:
        answer = s3.get_object(**asked)
    except ClientError as error:
        if status_of(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise beyond from error
        raise
    with contextlib.closing(answer["Body"]) as body:
        found = answer.get("ContentRange", "")
        if not found:
            raise StoreError(f"the server answers all of {asked['Key']!r} where a range was asked: use another server")
        if not found.replace(" ", "=").startswith(asked["Range"] + "/"):
            raise beyond
        read_into(body, into, ends)


def read_into(body: Any, buffer: memoryview, ends: float) -> None:
    """Fills ``buffer`` with exactly the answer's bytes. Raises AgainError where there are more or fewer."""
    done = 0
    while done < buffer.nbytes:
        found = body.readinto(buffer[done : done + CHUNK_BYTES])
        done += found
        if not found or time.monotonic() > ends:
            raise AgainError("the answer ends early")
    if body.read(1):  # at the end this verifies the server's checksum, where there is one
        raise AgainError("the answer goes on behind its end")


def read_to_end(body: Any, ends: float) -> bytes:
    """All of an answer's bytes, of which it does not say how many they are. Raises AgainError behind the deadline."""
    found = bytearray()
    while chunk := body.read(CHUNK_BYTES):
        found += chunk
        if time.monotonic() > ends:
            raise AgainError("the answer goes on behind its deadline")
    return bytes(found)


def crc32(body: bytes | bytearray) -> str:
    """The CRC-32 of ``body`` as S3 writes it: four bytes in base64."""
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def _spans(start: int, length: int) -> list[tuple[int, int]]:
    """``[start, start + length)`` cut into parts, each with its end."""
    size = max(PART_BYTES, -(-length // MAX_PARTS))
    return [(first, min(first + size, start + length)) for first in range(start, start + length, size)]


def _join(views: Sequence[memoryview], ends: Sequence[int], start: int, stop: int) -> bytes:
    """The bytes ``[start, stop)`` of the views one behind the other; ``ends`` are the ends of each of them."""
    pieces = []
    for number in range(bisect_right(ends, start), len(views)):
        begins = ends[number] - views[number].nbytes
        if begins >= stop:
            break
        pieces.append(views[number][max(start - begins, 0) : stop - begins])
    return b"".join(pieces)
