"""An HTTP proxy in front of an S3 server that breaks chosen requests in chosen ways."""

import http.client
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Exchange:
    """One request in the hands of a fault, which answers it, or breaks it, as it likes."""

    handler: "_Handler"
    operation: str
    body: bytes

    def ask(self) -> Answer:
        """The server's answer to the request."""
        proxy = self.handler.server.proxy
        upstream = http.client.HTTPConnection(*proxy.upstream, timeout=30)
        try:
            upstream.putrequest(self.handler.command, self.handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.handler.headers.items():
                upstream.putheader(name, value)
            with suppress(ConnectionError):  # a server that refuses may answer before it has read all
                upstream.endheaders(self.body or None)
            found = upstream.getresponse()
            data = found.read()
            skipped = {"transfer-encoding", "connection"}
            return Answer(found.status, [h for h in found.getheaders() if h[0].lower() not in skipped], data)
        finally:
            upstream.close()

    def reply(self, answer: Answer, keep: int | None = None) -> None:
        """Sends the answer; of its body only the first ``keep`` bytes where that is given."""
        if not any(name.lower() == "content-length" for name, _ in answer.headers):
            answer = Answer(answer.status, [*answer.headers, ("Content-Length", str(len(answer.body)))], answer.body)
        self.reply_as_it_is(answer, keep)

    def reply_as_it_is(self, answer: Answer, keep: int | None = None) -> None:
        """``reply`` without a length that the answer does not have."""
        self.handler.send_response_only(answer.status)
        for name, value in answer.headers:
            self.handler.send_header(name, value)
        self.handler.end_headers()
        self.handler.wfile.write(answer.body[:keep])

    def reset(self) -> None:
        """Ends the connection as a crash does."""
        self.handler.close_connection = True
        client = self.handler.connection
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    def stall(self, seconds: float) -> None:
        """Says nothing for so long, or until the proxy ends."""
        self.handler.server.proxy.ended.wait(seconds)


Fault = Callable[[Exchange], None]


def refuse(status: int, code: str) -> Fault:
    """Answers an error without asking the server."""

    def fault(exchange: Exchange) -> None:
        exchange.reply(Answer(status, [("Content-Type", "application/xml")], _ERROR.format(code=code).encode()))

    return fault


def redirect(exchange: Exchange) -> None:
    """Sends the request elsewhere, as a proxy does that wants another scheme."""
    exchange.reply(Answer(301, [("Location", "https://elsewhere.invalid/")], b""))


def reset(exchange: Exchange) -> None:
    """Ends the connection without asking the server."""
    exchange.reset()


def lose(exchange: Exchange) -> None:
    """Has the server do it and ends the connection instead of answering."""
    exchange.ask()
    exchange.reset()


def fail_behind(exchange: Exchange) -> None:
    """Has the server do it and answers that it failed."""
    exchange.ask()
    refuse(500, "InternalError")(exchange)


def twice(exchange: Exchange) -> None:
    """Has the server do it twice, as a load balancer does that tries again by itself; answers the second."""
    exchange.ask()
    exchange.reply(exchange.ask())


def pretend(exchange: Exchange) -> None:
    """Answers success whatever the server says, as one does that does not know the condition."""
    answer = exchange.ask()
    exchange.reply(Answer(200, [("ETag", '"0"')], b"") if answer.status == 412 else answer)


def without(*names: str) -> Fault:
    """Leaves fields out of the answer, headers or elements; without its length the body comes in chunks."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask()
        body = answer.body
        for name in names:
            body = re.sub(rf"<{name}>.*?</{name}>".encode(), b"", body, flags=re.DOTALL)
        headers = [(name, value) for name, value in answer.headers if name not in names]
        if "Content-Length" in names and exchange.handler.command != "HEAD":
            headers.append(("Transfer-Encoding", "chunked"))
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        elif exchange.handler.command != "HEAD":
            headers = [(name, value) for name, value in headers if name != "Content-Length"]
            headers.append(("Content-Length", str(len(body))))
        exchange.reply_as_it_is(Answer(answer.status, headers, body))

    return fault


def turned(exchange: Exchange) -> None:
    """Lists the other way round, as a server does that keeps no order."""
    answer = exchange.ask()
    entries = re.findall(rb"<Contents>.*?</Contents>", answer.body, flags=re.DOTALL)
    body = answer.body.replace(b"".join(entries), b"".join(reversed(entries)))
    exchange.reply(Answer(answer.status, answer.headers, body))


def cut(exchange: Exchange) -> None:
    """Ends the connection in the middle of the answer's body."""
    answer = exchange.ask()
    exchange.reply(answer, len(answer.body) // 2)
    exchange.reset()


def shorten(exchange: Exchange) -> None:
    """Answers half of the body as if it were the whole."""
    answer = exchange.ask()
    half = answer.body[: len(answer.body) // 2]
    headers = [(n, str(len(half)) if n.lower() == "content-length" else v) for n, v in answer.headers]
    exchange.reply(Answer(answer.status, headers, half))


def flip(exchange: Exchange) -> None:
    """Changes one bit of the answer's body."""
    answer = exchange.ask()
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    exchange.reply(Answer(answer.status, answer.headers, bytes(body)))


def stall(seconds: float) -> Fault:
    """Says nothing for so long, then ends the connection; the server is never asked."""

    def fault(exchange: Exchange) -> None:
        exchange.stall(seconds)
        exchange.reset()

    return fault


def stall_behind(seconds: float) -> Fault:
    """Has the server do it, answers half of the body and then says nothing for so long."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask()
        if answer.body:
            exchange.reply(answer, len(answer.body) // 2)
        exchange.stall(seconds)
        exchange.reset()

    return fault


class Stale:
    """Answers every request with the answer to the first of the same path."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}

    def __call__(self, exchange: Exchange) -> None:
        path = exchange.handler.path
        if path not in self._answers:
            self._answers[path] = exchange.ask()
        exchange.reply(self._answers[path])


@dataclass
class _Plan:
    fault: Fault
    operation: str
    left: float
    chance: float


@dataclass
class FaultProxy:
    """Breaks what ``fail`` names and passes everything else on; ``seen`` counts requests by operation.

    Operations: ``put``, ``create`` (a conditional put), ``get``, ``range``, ``head``, ``delete``, ``list``,
    ``begin``, ``part``, ``complete``, ``abort``, ``uploads``.
    """

    upstream: tuple[str, int]
    endpoint: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)
    _plans: list[_Plan] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def fail(self, operation: str, fault: Fault, times: float = 1, chance: float = 1.0) -> None:
        """Breaks the next ``times`` requests of ``operation`` (``*``: of any), each with that chance."""
        self._plans.append(_Plan(fault, operation, times, chance))

    def heal(self) -> None:
        """Breaks nothing more."""
        self._plans.clear()

    def due(self, operation: str) -> Fault | None:
        with self._lock:
            self.seen[operation] += 1
            for plan in self._plans:
                if plan.operation in (operation, "*") and plan.left > 0 and self._random.random() < plan.chance:
                    plan.left -= 1
                    return plan.fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # who asked is gone; the server would wait for the rest, and everybody for the server
            self.close_connection = True
            return
        exchange = Exchange(self, _operation(self), body)
        fault = self.server.proxy.due(exchange.operation)
        if fault is not None:
            fault(exchange)
        else:
            exchange.reply(exchange.ask())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve


def _operation(handler: _Handler) -> str:
    query = parse_qs(urlsplit(handler.path).query, keep_blank_values=True)
    match handler.command:
        case "GET":
            known = {"list-type": "list", "uploads": "uploads"}
            found = [name for mark, name in known.items() if mark in query]
            return found[0] if found else ("range" if "Range" in handler.headers else "get")
        case "PUT":
            return "part" if "partNumber" in query else "create" if "If-None-Match" in handler.headers else "put"
        case "POST":
            return "begin" if "uploads" in query else "complete"
        case "DELETE":
            return "abort" if "uploadId" in query else "delete"
    return handler.command.lower()


@contextmanager
def fault_proxy(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy on a free port of this machine in front of ``endpoint``, an ``http://`` one, while the body runs."""
    parts = urlsplit(endpoint)
    assert parts.scheme == "http"
    assert parts.hostname
    proxy = FaultProxy((parts.hostname, parts.port or 80))
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = proxy
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
