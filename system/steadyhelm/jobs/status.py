"""A run's status, asked of its driver."""

from __future__ import annotations

import http.client

from pydantic import ValidationError

from steadyhelm.errors import ConfigError, RequestRefusedError, TokenRefusedError, UnreachableError
from steadyhelm.jobs.head import STATUS_PORT
from steadyhelm.jobs.token import bearer
from steadyhelm.jobs.wire import exchange, server
from steadyhelm.telemetry.status import PATH, RunStatus


def read_status(address: str, token: str = "", timeout_s: float = 5.0) -> RunStatus:
    """What the driver that serves at ``address`` (``http://host:8266``) answers.

    Raises UnreachableError where none does, TokenRefusedError, RequestRefusedError for another answer, and ConfigError
    for an address that is none.
    """
    try:
        url = server(address)
    except ValueError:
        raise ConfigError(
            f"{address!r} is no address of a driver's status: give http://host:port, its port is mostly {STATUS_PORT}"
        ) from None
    try:
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
