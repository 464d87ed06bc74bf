"""Where an S3 store is: ``s3://bucket/prefix?endpoint=…``, all of it in one line that opens the store from anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from urllib.parse import parse_qsl, quote, urlsplit

from steadyhelm.errors import ConfigError

TIMEOUT_S = 30.0
"""Default of ``timeout_s``."""
DEADLINE_S = 180.0
"""Default of ``deadline_s``."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_FORM = "s3://bucket/prefix?endpoint=https://host:port&region=name"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Address:
    """A place in a bucket, and how its server is spoken to. Credentials are never part of it.

    What is left empty comes from boto3's standard chain in each process (``AWS_ENDPOINT_URL``, ``AWS_REGION``,
    profiles). ``path_style`` puts the bucket into the path instead of the host name; it is on where an endpoint is
    given, since most servers other than AWS need it.

    Attributes:
        bucket: name of a bucket that exists.
        prefix: what all keys begin with, without slashes at its ends; empty for the whole bucket.
        endpoint: ``https://host:port`` of the server.
        region: its region.
        path_style: whether the bucket is part of the path.
        timeout_s: seconds of silence on a connection after which a request counts as lost and is made again.
        deadline_s: seconds for a request with all its retries; an object above 16 MiB takes several requests.

    Example: ``S3Address.parse("s3://bucket/runs?endpoint=http://127.0.0.1:9000").prefix == "runs"``
    """

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    path_style: bool = False
    timeout_s: float = TIMEOUT_S
    deadline_s: float = DEADLINE_S

    @classmethod
    def parse(cls, uri: str) -> S3Address:
        """The address that ``uri`` names. Raises ConfigError, which never repeats what may be a secret."""
        try:
            parts = urlsplit(uri)
        except ValueError:
            raise ConfigError(f"store.uri is no URI: write it as {_FORM}") from None
        if "@" in parts.netloc:
            raise ConfigError(
                "store.uri has credentials before an '@': take them out, they come from the environment, a profile "
                "or the machine's role"
            )
        if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or parts.fragment:
            raise ConfigError(f"store.uri names no bucket: write it as {_FORM}")
        prefix = parts.path.strip("/")
        if any(part in {"", ".", ".."} for part in prefix.split("/")) and prefix:
            raise ConfigError(f"store.uri has an empty part, '.' or '..' in its prefix {prefix!r}: write it as {_FORM}")
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        known = [field.name for field in fields(cls) if field.name not in {"bucket", "prefix"}]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise ConfigError(
                f"store.uri has the unknown setting {unknown[0]!r} behind '?': known are {', '.join(known)}"
            )
        endpoint = given.get("endpoint", "")
        return cls(
            bucket=parts.netloc,
            prefix=prefix,
            endpoint=_checked_endpoint(endpoint),
            region=given.get("region", ""),
            path_style=_switch(given.get("path_style", "1" if endpoint else "0")),
            timeout_s=_seconds("timeout_s", given.get("timeout_s", str(TIMEOUT_S))),
            deadline_s=_seconds("deadline_s", given.get("deadline_s", str(DEADLINE_S))),
        )

    def __str__(self) -> str:
        """The URI that ``parse`` reads; settings at their defaults are left out."""
        settings = {
            "endpoint": self.endpoint,
            "region": self.region,
            "path_style": "" if self.path_style == bool(self.endpoint) else str(int(self.path_style)),
            "timeout_s": "" if self.timeout_s == TIMEOUT_S else f"{self.timeout_s:g}",
            "deadline_s": "" if self.deadline_s == DEADLINE_S else f"{self.deadline_s:g}",
        }
        query = "&".join(f"{name}={quote(value, safe=':/')}" for name, value in settings.items() if value)
        place = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        return f"{place}?{query}" if query else place


def _checked_endpoint(endpoint: str) -> str:
    if not endpoint:
        return ""
    try:
        parts = urlsplit(endpoint)
        is_good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or "@" in parts.netloc or parts.query:
        raise ConfigError("store.uri: endpoint must be like https://host:port, without credentials")
    return endpoint.rstrip("/")


def _switch(value: str) -> bool:
    if value not in {"0", "1"}:
        raise ConfigError(f"store.uri: path_style is {value!r}, give 0 or 1")
    return value == "1"


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"store.uri: {name} is {value!r}, give seconds above 0")
    return seconds
