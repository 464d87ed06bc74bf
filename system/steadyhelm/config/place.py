"""What ``store.uri`` may say."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from steadyhelm.config.s3 import S3Address
from steadyhelm.errors import ConfigError


def parse_place(uri: str) -> Path | S3Address:
    """The folder or the place in a bucket that ``uri`` names: a folder, a ``file://`` or an ``s3://`` URI.

    Raises ConfigError for any other text. Example: ``parse_place("file:///data/runs") == Path("/data/runs")``
    """
    if not uri.strip():
        raise ConfigError("store.uri is empty: give a folder, like 'runs'")
    if uri.startswith("s3:"):
        return S3Address.parse(uri)
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return Path(uri)
    if scheme != "file":
        raise ConfigError(
            f"store.uri {uri!r} has the unknown scheme {scheme!r}: give a folder, 'file:///…' or 's3://…'"
        )
    host, slash, _ = rest.partition("/")
    if host not in {"", "localhost"} or not slash:
        raise ConfigError(f"store.uri {uri!r} names a host: write 'file:///' and an absolute path")
    return Path(unquote(urlsplit(uri).path))
