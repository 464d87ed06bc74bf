"""A run's status, asked of its driver."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from pydantic import ValidationError

from steadyhelm.errors import RequestRefusedError, TokenRefusedError, UnreachableError
from steadyhelm.jobs.token import bearer
from steadyhelm.jobs.wire import exchange
from steadyhelm.telemetry.status import PATH, RunStatus


def read_status(address: str, token: str = "", timeout_s: float = 5.0) -> RunStatus:
    """What the driver that serves at ``address`` (``http://host:8266``) answers.

    Raises UnreachableError where none does, TokenRefusedError, and RequestRefusedError for another answer.
    """
    try:
        url = urlsplit(address)
        status, body = exchange(url, "GET", url.path.rstrip("/") + PATH, None, bearer(token), timeout_s)
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"No driver serves its status at {address} ({error}).") from error
    if status in (401, 403):
        raise TokenRefusedError(f"{address} refuses the token: it is another cluster's, or there is none.")
    try:
        if status == 200:
            return RunStatus.model_validate_json(body)
    except ValidationError:
        pass
    raise RequestRefusedError(f"{address} serves no run's status (HTTP {status}).")
