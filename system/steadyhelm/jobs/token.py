"""The token of a Ray cluster's API: where Ray itself looks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from steadyhelm.errors import TokenRefusedError


def api_token(environment: Mapping[str, str], file: Path | None = None) -> str:
    """The token; empty where there is none, or where ``RAY_AUTH_MODE`` is ``disabled``.

    It is read from ``file``, or else from ``RAY_AUTH_TOKEN``, the file that ``RAY_AUTH_TOKEN_PATH`` names, or, where
    ``RAY_AUTH_MODE`` is ``token``, ``~/.ray/auth_token``. Raises OSError for a named file that cannot be read.
    """
    if file is not None:
        return _read(file)
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        return ""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if path := environment.get("RAY_AUTH_TOKEN_PATH", ""):
        return _read(Path(path).expanduser())
    usual = Path.home() / ".ray" / "auth_token"
    return _read(usual) if mode == "token" and usual.is_file() else ""


def bearer(token: str) -> dict[str, str]:
    """The headers that show the token; none where it is empty.

    Raises TokenRefusedError, with not a letter of it, where it is not one line of printable ASCII, as a header is.
    """
    if not (token.isascii() and token.isprintable()):
        raise TokenRefusedError(
            "The Ray API's token is not one line of printable ASCII: see that its file, variable or Secret has no more."
        )
    return {"Authorization": f"Bearer {token}"} if token else {}


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace").strip()  # what is no text is no token, as bearer says
