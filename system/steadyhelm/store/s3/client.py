"""One boto3 client per process and server: its connections are reused by every thread and every store.

boto3 is imported when the first request is made, so that nothing else has to wait for it. Credentials come from its
standard chain (environment, profiles, the machine's role) and are neither read nor logged here.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from steadyhelm.config.s3 import S3Address
from steadyhelm.errors import ConfigError

TRANSFERS = 16
"""Requests of one process that move parts of large objects, or look up many objects, at a time."""
CONNECTIONS = 64
"""Connections that are kept open to one server."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's client, safe to call from any thread, and the threads that do the parallel part of one call.

    ``answered`` is set once the server has answered anything.
    """

    client: Any
    threads: ThreadPoolExecutor
    answered: threading.Event


_Connections = dict[tuple[str, str, bool, float], Connection]
_connections: _Connections = {}
_lock = threading.Lock()


def connection(address: S3Address) -> Connection:
    """This process's connection to the server of ``address``. Raises ConfigError where boto3 cannot be set up."""
    key = (address.endpoint, address.region, address.path_style, address.timeout_s)
    with _lock:
        if key not in _connections:
            threads = ThreadPoolExecutor(TRANSFERS, "steadyhelm-s3")
            _connections[key] = Connection(_client(address), threads, threading.Event())
        return _connections[key]


def _client(address: S3Address) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=address.timeout_s,
        read_timeout=address.timeout_s,
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        retries={"total_max_attempts": 1},  # retries are ours: only then is it known what a request may have done
        request_checksum_calculation="when_required",  # ours go into headers, which older servers take as well
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if address.path_style else "virtual"},
    )
    try:
        return boto3.session.Session().client(
            "s3", endpoint_url=address.endpoint or None, region_name=address.region or None, config=config
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"store.uri: no S3 client for endpoint {address.endpoint or 'of the environment'!r} "
            f"({type(error).__name__}): mend store.uri, or the AWS_* settings of the environment"
        ) from error


def _forget() -> None:
    """A forked process makes connections of its own: two processes on one socket read each other's answers."""
    global _lock
    _lock = threading.Lock()
    _connections.clear()


os.register_at_fork(after_in_child=_forget)
