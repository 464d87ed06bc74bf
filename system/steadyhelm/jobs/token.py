"""The token of a Ray cluster's API: where Ray itself looks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def api_token(environment: Mapping[str, str], file: Path | None = None) -> str:
    """The token; empty where there is none, or where ``RAY_AUTH_MODE`` is ``disabled``.

    It is read from ``file``, or else from ``RAY_AUTH_TOKEN``, the file that ``RAY_AUTH_TOKEN_PATH`` names, or, where
    ``RAY_AUTH_MODE`` is ``token``, ``~/.ray/auth_token``. Raises OSError for a named file that cannot be read.
    """
    if file is not None:
        return file.read_text(encoding="utf-8").strip()
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        return ""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if path := environment.get("RAY_AUTH_TOKEN_PATH", ""):
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    usual = Path.home() / ".ray" / "auth_token"
    return usual.read_text(encoding="utf-8").strip() if mode == "token" and usual.is_file() else ""
