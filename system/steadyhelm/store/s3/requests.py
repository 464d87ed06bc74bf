"""One request to an S3 server: tried again with jitter until its deadline, every failure told apart.

Failures that pass (silence, a reset, an answer cut short, 5xx but for what the server lacks, 429, "slow down", a
checksum that shows damage on the way) are tried again. All others end the call at once with an error that says what to
do. Messages name the server's error code, never its text, which may quote signatures.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from steadyhelm.config.s3 import S3Address
from steadyhelm.errors import ObjectMissingError, StoreError
from steadyhelm.store.s3.client import Connection, connection

T = TypeVar("T")
FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 5.0
"""Bounds of the pause before another try; it is drawn between zero and a limit that doubles from the first to this."""
FIRST_ANSWER_S = 20.0
"""Deadline while a server has never answered: a wrong endpoint shows before a user loses patience."""
NOTICE_S = 10.0
"""A request that has been failing for so long says so in the log, and again after each such period."""

ONE_WINNER = "a server that keeps it (AWS S3, Ceph RGW, versitygw with 'posix --concurrency 1'), or a folder"
"""What to use where conditional creation does not hold."""

_PASSING_STATUS = frozenset({408, 409, 425, 429})
_LACKING_STATUS = frozenset({501, 505, 507})
"""Failures of a server that do not pass: it knows no such request, no such protocol, or has no room."""
_PASSING_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "RequestLimitExceeded",
        "RequestTimeout",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttled",
        "Throttling",
        "ThrottlingException",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
_MISSING = frozenset({"404", "NoSuchKey"})
_FOLDER_CODES = frozenset(
    {"ExistingObjectIsDirectory", "ObjectParentIsFile", "XMinioObjectExistsAsDirectory", "XMinioParentIsObject"}
)
_CREDENTIALS = "give right credentials in the environment, a profile or the machine's role"
_FULL = "the store is full: free some space or raise the quota, then resume the run"
_LACKS = (
    "the server does not know such a request; a run needs conditional creation (If-None-Match) above all: use "
    f"{ONE_WINNER}"
)
_REMEDIES = {
    "AccessDenied": "the credentials may not do that: grant them reading, writing, listing and deleting there",
    "403": "the credentials may not do that: grant them reading, writing, listing and deleting there",
    "NoSuchBucket": "there is no such bucket: create it, or mend store.uri",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "XAdminUserNotFound": _CREDENTIALS,
    "ExpiredToken": "the credentials have expired: renew them, then resume the run",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it, then resume the run",
    "PermanentRedirect": "the bucket is in another region: give it in store.uri as ?region=…",
    "AuthorizationHeaderMalformed": "the bucket is in another region: give it in store.uri as ?region=…",
    "NotImplemented": _LACKS,
    "501": _LACKS,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "507": _FULL,
}

logger = logging.getLogger(__name__)


class AgainError(Exception):
    """An answer cannot be used, and another one may: the request is made again."""


class Requests:
    """The requests to one address, made over this process's connection to its server."""

    def __init__(self, address: S3Address) -> None:
        self._address = address

    @property
    def connection(self) -> Connection:
        """This process's connection to the server."""
        return connection(self._address)

    def run(self, verb: str, key: str, send: Callable[[Any, float], T]) -> T:
        """What ``send`` returns, called until it does not fail in passing.

        Args:
            verb: what is done, for messages: ``"read"``.
            key: to which object.
            send: takes the boto3 client and the time (``time.monotonic``) at which the deadline ends; makes the
                request and reads the answer whole. It may be called several times.

        Raises:
            ObjectMissingError: the server has no such object.
            StoreError: the deadline is over, or no try would help.
        """
        server = self.connection
        started = told = time.monotonic()
        limit = FIRST_DELAY_S
        while True:
            longest = self._address.deadline_s
            ends = started + (longest if server.answered.is_set() else min(longest, FIRST_ANSWER_S))
            try:
                found = send(server.client, ends)
            except RecursionError as error:  # boto3 follows redirects to where it comes from
                raise StoreError(
                    f"cannot {verb} {key!r} in {self._address}: the server sends the request elsewhere without end: "
                    "mend endpoint (http or https, host) or region in store.uri",
                    "StoreRefused",
                ) from error
            except _failures() as error:
                if status_of(error):
                    server.answered.set()
                if not _passes(error):
                    raise self._translated(verb, key, error) from error
                now = time.monotonic()
                if now > ends:
                    raise StoreError(
                        f"cannot {verb} {key!r} in {self._address}: no success in {now - started:.0f} s, the last try "
                        f"ended with {_named(error)}: see whether the server is up and can be reached, then resume "
                        "the run",
                        "StoreUnreachable",
                    ) from error
                if now - told > NOTICE_S:
                    told = now
                    logger.warning("cannot %s %r in %s yet (%s): tries again", verb, key, self._address, _named(error))
                time.sleep(min(random.uniform(0, limit), max(ends - now, 0.0)))
                limit = min(2 * limit, LONGEST_DELAY_S)
            else:
                server.answered.set()
                return found

    def _translated(self, verb: str, key: str, error: Exception) -> StoreError:
        """The error of ours that ``error``, which does not pass, means."""
        from botocore.exceptions import NoCredentialsError, PartialCredentialsError

        place = f"cannot {verb} {key!r} in {self._address}"
        code = code_of(error)
        if code in _MISSING:
            return ObjectMissingError(
                f"there is no object {key!r} in {self._address}: it was never put, or a clean-up removed it"
            )
        if code in _FOLDER_CODES:
            return StoreError(f"{place}: one key is a folder of another: choose another key")
        if status_of(error):
            remedy = _REMEDIES.get(code) or _REMEDIES.get(str(status_of(error)))
            reason = "DiskFull" if remedy == _FULL else "StoreRefused"
            text = f"{place}: {_named(error)}: {remedy or 'see what the server says of that in its log'}"
            return StoreError(text, reason)
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return StoreError(f"{place}: there are no credentials: {_CREDENTIALS}", "StoreRefused")
        return StoreError(f"{place}: {_named(error)}: mend store.uri, or the AWS_* settings of the environment")


def field(answer: Mapping[str, Any], name: str, key: str) -> Any:
    """What the server's answer about ``key`` says under ``name``. Raises StoreError where it says nothing there."""
    if name not in answer:
        raise StoreError(f"the server answers without {name} about {key!r}: it is no whole S3 server, use another")
    return answer[name]


def code_of(error: BaseException | None) -> str:
    """The server's error code (``"NoSuchKey"``); empty where it is no answer of the server."""
    answer = getattr(error, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def status_of(error: BaseException | None) -> int:
    """The HTTP status of the server's error; 0 where it is no answer of the server."""
    answer = getattr(error, "response", None)
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(answer, dict) else 0


def _failures() -> tuple[type[Exception], ...]:
    """All exceptions of a request that are not faults of this program; looked up only once there is one."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return (AgainError, BotoCoreError, ClientError, HTTPError, ResponseParserError)


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed when it is made again."""
    from botocore import exceptions as of
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if status := status_of(error):
        code = code_of(error)
        passing = status in _PASSING_STATUS or (status >= 500 and status not in _LACKING_STATUS)
        return code not in _FOLDER_CODES and (code in _PASSING_CODES or passing)
    if isinstance(error, of.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    on_the_way = (of.ConnectionError, of.HTTPClientError, of.IncompleteReadError, of.FlexibleChecksumError)
    return isinstance(error, (*on_the_way, of.CredentialRetrievalError, AgainError, HTTPError, ResponseParserError))


def _named(error: Exception) -> str:
    """The failure in a word or two, without the server's text."""
    if status := status_of(error):
        code = code_of(error)
        return f"HTTP {status}" if code == str(status) else f"HTTP {status} {code}"
    return type(error).__name__
