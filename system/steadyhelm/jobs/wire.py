"""Bytes to and from an HTTP server within a deadline: one exchange, or the texts of a WebSocket (RFC 6455).

The standard library has no WebSocket; who only listens needs a handshake and a parser of frames.
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import ssl
import time
from typing import Final
from urllib.parse import SplitResult, urlsplit

CHUNK = 1 << 16
"""Bytes that are read at once."""
LARGEST_MESSAGE = 1 << 26
"""Bytes of a WebSocket message above which the other side is taken for something else."""
_TEXT_OR_MORE, _CLOSE, _PING, _PONG = (0x0, 0x1, 0x2), 0x8, 0x9, 0xA
_MASK: Final = bytes(4)  # a client has to mask what it sends; this mask changes nothing


class UpgradeRefusedError(Exception):
    """The server answered a WebSocket's handshake with ``status`` and ``text``."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.text = status, text


def server(address: str) -> SplitResult:
    """The parts of ``address``, ``http://host:port`` (https too). Raises ValueError where it is none."""
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or not url.path.isascii():
        raise ValueError(f"{address!r} is no address of an HTTP server")
    url.hostname.encode("idna")  # a UnicodeError is a ValueError
    return url


def exchange(
    url: SplitResult, method: str, path: str, body: bytes | None, headers: dict[str, str], deadline_s: float
) -> tuple[int, bytes]:
    """The status and the body that the server at ``url`` answers.

    Raises OSError (TimeoutError past the deadline) and http.client.HTTPException.
    """
    ends = time.monotonic() + deadline_s
    connection = _connection(url, deadline_s)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        parts: list[bytes] = []
        while part := response.read1(CHUNK):
            parts.append(part)
            left = ends - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no whole answer within {deadline_s:g} s")
            if connection.sock is not None:
                connection.sock.settimeout(left)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return response.status, b"".join(parts)
    finally:
        connection.close()


def _connection(url: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    host = url.hostname or ""
    if url.scheme == "https":
        return http.client.HTTPSConnection(host, url.port or 443, timeout=timeout_s)
    return http.client.HTTPConnection(host, url.port or 80, timeout=timeout_s)


class WebSocket:
    """Listens to the server's texts. ``receive`` may be called again after a TimeoutError: nothing is lost by it.

    Raises OSError where there is no connection, UpgradeRefusedError where the server has no WebSocket there.
    """

    def __init__(self, url: SplitResult, path: str, headers: dict[str, str], timeout_s: float) -> None:
        host = url.hostname or ""
        port = url.port or (443 if url.scheme == "https" else 80)
        self._held = bytearray()
        self._parts: list[bytes] = []
        self._socket: socket.socket = socket.create_connection((host, port), timeout_s)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if url.scheme == "https":
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
            self._shake_hands(f"{host}:{port}", path, headers)
        except BaseException:
            self._socket.close()
            raise

    def _shake_hands(self, host: str, path: str, headers: dict[str, str]) -> None:
        asked = {
            "Host": host,
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Version": "13",
        }
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (asked | headers).items()), "", ""]
        self._socket.sendall("\r\n".join(lines).encode("latin-1"))
        while b"\r\n\r\n" not in self._held:
            self._read()
        head, _, rest = bytes(self._held).partition(b"\r\n\r\n")
        self._held = bytearray(rest)
        status = head.split(b"\r\n", 1)[0].split(b" ")[1:2]
        if status != [b"101"]:
            number = int(status[0]) if status and status[0].isdigit() else 0
            raise UpgradeRefusedError(number, rest.decode("utf-8", "replace"))

    def receive(self, timeout_s: float) -> str | None:
        """The next text; None where the server has closed properly.

        Raises TimeoutError where none comes in time, ConnectionError where the connection breaks.
        """
        self._socket.settimeout(timeout_s)
        while True:
            frame = self._frame()
            if frame is None:
                self._read()
                continue
            kind, last, payload = frame
            if kind == _CLOSE:
                return None
            if kind == _PING:
                self._socket.sendall(bytes((0x80 | _PONG, 0x80 | len(payload))) + _MASK + payload)
            elif kind in _TEXT_OR_MORE:
                self._parts.append(payload)
                if last:
                    text = b"".join(self._parts).decode("utf-8", "replace")
                    self._parts.clear()
                    return text

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def _read(self) -> None:
        data = self._socket.recv(CHUNK)
        if not data:
            raise ConnectionError("the connection was closed in the middle")
        self._held += data

    def _frame(self) -> tuple[int, bool, bytes] | None:
        """Kind of the next frame, whether it ends its message, and what it carries; None where it is not whole yet."""
        held = self._held
        if len(held) < 2:
            return None
        kind, last, size = held[0] & 0x0F, bool(held[0] & 0x80), held[1] & 0x7F
        start = {126: 4, 127: 10}.get(size, 2)
        if len(held) < start:
            return None
        if start > 2:
            size = int.from_bytes(held[2:start], "big")
        if size > LARGEST_MESSAGE:
            raise ConnectionError(f"a message of {size} bytes")
        if len(held) < start + size:
            return None
        payload = bytes(held[start : start + size])
        del held[: start + size]
        return kind, last, payload
