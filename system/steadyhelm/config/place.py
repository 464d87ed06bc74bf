"""What ``store.uri`` may say, and what a run in the store may be called."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from steadyhelm.config.s3 import S3Address
from steadyhelm.errors import ConfigError

IMAGES = "images"
"""The folder of images in a store, beside the runs."""


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


def check_lasting(uri: str) -> None:
    """Raises ConfigError for a folder that would go away with a job of a cluster: a relative one."""
    if "://" not in uri and not Path(uri).is_absolute():
        raise ConfigError(
            f"store.uri is {uri!r}, a folder that would go away with the job: name a place that all nodes reach, "
            "s3://… or the absolute path of a shared folder"
        )


def check_run_id(run: str) -> None:
    """Raises ConfigError for an id of a run that is no single part of a key."""
    if run == IMAGES or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run):
        raise ConfigError(
            f"a run cannot be called {run!r}: use letters, digits, '.', '_' and '-', at most 100, and not {IMAGES!r}"
        )
