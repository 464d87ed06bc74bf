"""The object store in an S3 bucket: one S3 object per object.

Conditional creation is one PutObject with ``If-None-Match: *``, whatever the size, so that the commit point is one
request of which the server carries out one in a race; ``store.probe`` finds out whether it does. Whether a try whose
answer was lost has created the object is settled by what is there: the same bytes are ours.

Every upload carries a CRC-32 that the server verifies. ``read`` verifies the reference's xxh3-128 over the whole
object, ``get`` of an object below ``MULTIPART_BYTES`` the checksum that the server kept, where it keeps one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np

from steadyhelm.config.s3 import S3Address
from steadyhelm.data.types import ObjectRef
from steadyhelm.errors import CorruptObjectError, ObjectExistsError, ObjectMissingError, StoreError
from steadyhelm.store.checksum import Data, byte_views, make_ref, verify
from steadyhelm.store.keys import MAX_KEY_BYTES, check_key, check_prefix
from steadyhelm.store.local import check_range
from steadyhelm.store.s3.requests import AgainError, Requests, code_of, field, status_of
from steadyhelm.store.s3.transfer import MULTIPART_BYTES, BeyondEndError, Transfer, crc32, read_into, read_to_end

STALE_S = 3600.0
"""Age at which a multipart upload counts as left over by a writer that died."""
TRIES = 5
"""How often an object that is deleted whenever it is looked at is created again."""


class S3Store:
    """Objects under a prefix of a bucket, for the processes of any number of machines.

    Nothing is asked of the server before the first call. Safe to use from several threads and after a fork.

    Example: ``S3Store(S3Address.parse("s3://bucket/runs")).put("digits/run.json", b"{}", if_absent=True)``
    """

    def __init__(self, address: S3Address) -> None:
        self.address = address
        self._root = f"{address.prefix}/" if address.prefix else ""
        self._requests = Requests(address)
        self._transfer = Transfer(self._requests, address.bucket)
        self._is_open = False  # whether a listing was allowed

    @property
    def uri(self) -> str:
        """The address in one line, without credentials."""
        return str(self.address)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def __reduce__(self) -> tuple[type[S3Store], tuple[S3Address]]:
        return S3Store, (self.address,)

    def put(self, key: str, data: Data, *, if_absent: bool = False) -> ObjectRef:
        """Writes an object, with ``if_absent`` only where there is none. Raises ObjectExistsError, StoreError."""
        place, views = self._place(key), byte_views(data)
        ref = make_ref(key, views)
        if ref.num_bytes > MULTIPART_BYTES and not if_absent:
            self._transfer.upload(place["Key"], key, views)
            return ref
        body = b"".join(views)
        put = {**place, "Body": body, "ChecksumCRC32": crc32(body)}
        if if_absent:
            self._create(put, ref)
        else:
            self._requests.run("write", key, lambda s3, _: s3.put_object(**put))
        return ref

    def flush(self, keys: Iterable[str]) -> None:
        """Makes sure that they are there: what the server has confirmed is durable. Raises ObjectMissingError."""
        list(self._requests.connection.threads.map(self._look_up, keys))

    def get(self, key: str) -> memoryview:
        """The object's bytes, read-only, in memory of their own. Raises ObjectMissingError."""
        place = self._place(key)
        while True:
            size, etag, data = self._requests.run("read", key, partial(_open, place))
            if data is not None:
                return data
            try:
                return self._transfer.download(place["Key"], key, 0, size, etag)
            except StoreError as error:
                if status_of(error.__cause__) != HTTPStatus.PRECONDITION_FAILED:
                    raise  # else it was replaced while it was read, and the new one is read

    def read(self, ref: ObjectRef) -> memoryview:
        """The object's bytes, verified; read once more where they do not match, so that damage on the way is no error.

        Raises ObjectMissingError, CorruptObjectError.
        """
        place = self._place(ref.key)
        try:
            if ref.num_bytes > MULTIPART_BYTES:
                return verify(self._transfer.download(place["Key"], ref.key, 0, ref.num_bytes), ref, self.uri)
            return verify(self.get(ref.key), ref, self.uri)
        except (CorruptObjectError, BeyondEndError):
            return verify(self.get(ref.key), ref, self.uri)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes ``[start, start + length)``. Raises ObjectMissingError, StoreError."""
        place = self._place(key)
        if start < 0 or length <= 0:
            check_range(key, start, length, self._size(key))
            return b""
        try:
            return bytes(self._transfer.download(place["Key"], key, start, length))
        except BeyondEndError:
            check_range(key, start, length, self._size(key))
            raise

    def list(self, prefix: str) -> Iterator[str]:
        """The keys that begin with the string ``prefix``, in the order of their UTF-8 bytes.

        Raises StoreError where the server lists them otherwise: some may then be missing behind a page's end.
        """
        place = {"Bucket": self.address.bucket, "Prefix": self._root + check_prefix(prefix)}
        last = b""
        while True:
            page = self._requests.run("list", prefix, lambda s3, _: s3.list_objects_v2(**place))
            for item in page.get("Contents", ()):
                name = item["Key"].encode()
                if name <= last:
                    raise StoreError(
                        f"{self.uri} lists {item['Key']!r} behind {last.decode()!r}: the order of keys is not that of "
                        "their bytes, which a run relies on; use a server that keeps it (S3's directory buckets do not)"
                    )
                last = name
                yield item["Key"].removeprefix(self._root)
            if not page.get("IsTruncated"):
                return
            place["ContinuationToken"] = field(page, "NextContinuationToken", prefix)

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""
        try:
            self._look_up(key)
        except ObjectMissingError:
            return False
        return True

    def delete(self, key: str) -> None:
        """Removes the object; without effect where there is none."""
        place = self._place(key)
        with contextlib.suppress(ObjectMissingError):
            self._requests.run("delete", key, lambda s3, _: s3.delete_object(**place))

    def sweep(self, prefix: str, *, older_s: float = STALE_S, dry_run: bool = False) -> tuple[str, ...]:
        """Aborts multipart uploads of keys below ``prefix`` that were begun ``older_s`` ago; returns their keys.

        The server's clock counts. With ``dry_run`` nothing is aborted.
        """
        place = {"Bucket": self.address.bucket, "Prefix": self._root + check_prefix(prefix)}
        swept = []
        while True:
            page = self._requests.run("list uploads of", prefix, lambda s3, _: s3.list_multipart_uploads(**place))
            now = parsedate_to_datetime(field(page["ResponseMetadata"]["HTTPHeaders"], "date", prefix))
            for upload in page.get("Uploads", ()):
                if (now - upload["Initiated"]).total_seconds() < older_s:
                    continue
                key = upload["Key"].removeprefix(self._root)
                swept.append(key)
                if not dry_run:
                    self._abort(key, upload["UploadId"])
            if not page.get("IsTruncated"):
                return tuple(swept)
            place["KeyMarker"] = field(page, "NextKeyMarker", prefix)
            place["UploadIdMarker"] = field(page, "NextUploadIdMarker", prefix)

    def _place(self, key: str) -> dict[str, str]:
        """Bucket and full key, as boto3 takes them. Raises StoreError for a bad key."""
        full = self._root + check_key(key)
        if len(full.encode()) > MAX_KEY_BYTES:
            raise StoreError(f"{key!r} cannot be the key of an object in {self.uri}: with its prefix it is too long")
        return {"Bucket": self.address.bucket, "Key": full}

    def _create(self, put: dict[str, Any], ref: ObjectRef) -> None:
        """Creates the object of ``ref``, or finds the same bytes there: those of an own try whose answer was lost."""
        for _ in range(TRIES):
            if self._requests.run("write", ref.key, partial(_created, put)):
                return
            try:
                if make_ref(ref.key, [self.get(ref.key)]) == ref:
                    return
            except ObjectMissingError:
                continue  # deleted since
            raise ObjectExistsError(f"object {ref.key!r} exists already in {self.uri}: another writer was first")
        raise StoreError(
            f"cannot write {ref.key!r} in {self.uri}: the server refuses to create it since it exists, and to read it "
            "since it does not: look at the bucket with another tool"
        )

    def _look_up(self, key: str) -> dict[str, Any]:
        """What the server says of an object. Raises ObjectMissingError; StoreError where the bucket is missing, too."""
        place = self._place(key)
        try:
            found: dict[str, Any] = self._requests.run("look up", key, lambda s3, _: s3.head_object(**place))
        except ObjectMissingError:
            if not self._is_open:
                next(self.list(key), None)  # a refusal has a reason here; the answer to a HEAD has none
                self._is_open = True
            raise
        return found

    def _size(self, key: str) -> int:
        """Bytes of an object. Raises ObjectMissingError, StoreError."""
        return int(field(self._look_up(key), "ContentLength", key))

    def _abort(self, key: str, upload: str) -> None:
        place = {**self._place(key), "UploadId": upload}
        try:
            self._requests.run("abort an upload of", key, lambda s3, _: s3.abort_multipart_upload(**place))
        except StoreError as error:
            if code_of(error.__cause__) != "NoSuchUpload":
                raise


def _created(put: dict[str, Any], s3: Any, _: float) -> bool:
    """Creates an object; False where there is one."""
    from botocore.exceptions import ClientError

    try:
        s3.put_object(**put, IfNoneMatch="*")
    except ClientError as error:
        if code_of(error) == "NoSuchKey":
            raise AgainError("a delete came between") from error
        if status_of(error) != HTTPStatus.PRECONDITION_FAILED:
            raise
        return False
    return True


def _open(place: dict[str, str], s3: Any, ends: float) -> tuple[int, str, memoryview | None]:
    """An object's size, and its bytes or, where it is so large that it is better read in parts, its ETag."""
    answer = s3.get_object(**place, ChecksumMode="ENABLED")
    with contextlib.closing(answer["Body"]) as body:
        if "ContentLength" not in answer:  # it comes in chunks, whose end shows
            data = memoryview(read_to_end(body, ends))
            return data.nbytes, "", data
        size = int(answer["ContentLength"])
        if size > MULTIPART_BYTES:
            return size, field(answer, "ETag", place["Key"]), None
        buffer = np.empty(size, np.uint8).data
        read_into(body, buffer, ends)
    return size, "", buffer.toreadonly()
