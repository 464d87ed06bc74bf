"""Which strings are keys of objects."""

from __future__ import annotations

from steadyhelm.errors import StoreError

MAX_KEY_BYTES = 1024
"""Longest key in UTF-8: the limit of S3."""
MAX_PART_BYTES = 255
"""Longest part between slashes: the limit of a file name."""


def check_key(key: str) -> str:
    """``key`` itself where it may name an object; StoreError otherwise.

    A key is a relative path: parts joined by single slashes, none of them empty, ``.`` or ``..``, without control
    characters and backslashes. The first part does not begin with a dot: stores keep files of their own there.
    """
    parts = key.split("/")
    fault = ""
    if any(part in {"", ".", ".."} for part in parts):
        fault = "an empty part, '.' or '..'"
    elif not key.isprintable() or "\\" in key:
        fault = "a control character or a backslash"
    elif key.startswith("."):
        fault = "a dot at its start"
    else:
        encoded = key.encode("utf-8", "surrogatepass")
        if len(encoded) > MAX_KEY_BYTES or max(len(part.encode("utf-8")) for part in parts) > MAX_PART_BYTES:
            fault = f"over {MAX_KEY_BYTES} bytes, or a part over {MAX_PART_BYTES} bytes"
    if fault:
        raise StoreError(
            f"{key!r} cannot be the key of an object, it has {fault}: use a relative path like 'run/log/1'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """``prefix`` itself where keys may begin with it (the empty one included); StoreError otherwise."""
    if prefix:
        check_key(prefix + "x" if prefix.endswith("/") else prefix)
    return prefix
