"""A Kubernetes API server as `kubectl proxy` serves it at a Unix socket, wherever it is and however one signs in."""

import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

Manifest = dict[str, Any]
TIMEOUT_S = 30.0
MERGE = "application/merge-patch+json"


class ApiError(Exception):
    """The API server refused, with ``code`` as HTTP status; 0 where it could not be asked."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Api:
    """Asks the API server; every call ends within ``TIMEOUT_S``."""

    def __init__(self, proxy: Path) -> None:
        self.proxy = proxy

    def call(
        self, method: str, path: str, body: object = None, *, kind: str = "application/json", **headers: str
    ) -> bytes:
        """The answer's body. Raises ApiError."""
        connection = _Connection(self.proxy)
        sent = {"Host": "localhost", "Content-Type": kind, **headers}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), sent)
            answer = connection.getresponse()
            content = answer.read()
        except OSError as error:
            raise ApiError(f"{method} {path}: {error}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise ApiError(f"{method} {path}: {answer.status} {content.decode(errors='replace')[:600]}", answer.status)
        return content

    def get(self, path: str) -> Manifest | None:
        """An object; None where there is none."""
        try:
            found: Manifest = json.loads(self.call("GET", path))
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        return found

    def items(self, path: str, **labels: str) -> list[Manifest]:
        """The objects of a collection, by labels (``_`` for what is no letter is the caller's to avoid)."""
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        query = f"?{urlencode({'labelSelector': selector})}" if selector else ""
        found: list[Manifest] = json.loads(self.call("GET", path + query))["items"]
        return found

    def create(self, path: str, manifest: Mapping[str, Any]) -> bool:
        """Creates an object; False where one of that name is there."""
        try:
            self.call("POST", path, manifest)
        except ApiError as error:
            if error.code == 409:
                return False
            raise
        return True

    def merge(self, path: str, changes: Mapping[str, Any]) -> None:
        """Changes fields of an object."""
        self.call("PATCH", path, changes, kind=MERGE)

    def delete(self, path: str, *, grace_s: int | None = None) -> None:
        """Deletes an object, and waits for nothing; one that is gone stays so."""
        options = {} if grace_s is None else {"gracePeriodSeconds": grace_s}
        try:
            self.call("DELETE", path, {"propagationPolicy": "Background", **options})
        except ApiError as error:
            if error.code != 404:
                raise


class _Connection(http.client.HTTPConnection):
    def __init__(self, proxy: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._proxy = proxy

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._proxy))
