"""Ray's Jobs API as its documentation and its answers have it, over real sockets on this machine."""

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TOKEN = "canary-token-0123456789"


@dataclass
class FakeCluster:
    """What the server knows. ``broken`` answers a request itself where it returns True; ``run`` is what a job does."""

    token: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
    cut_tail_after: list[int] = field(default_factory=list)
    ping: bool = False
    run: Callable[[str], None] = lambda submission_id: None
    address: str = ""

    def add(self, submission_id: str, status: str = "RUNNING", **more: Any) -> None:
        self.jobs[submission_id] = {
            "submission_id": submission_id,
            "type": "SUBMISSION",
            "status": status,
            "entrypoint": "true",
            "message": None,
            "metadata": {},
            "start_time": 1000 * (len(self.jobs) + 1),
            "end_time": None,
            "driver_exit_code": None,
        } | more

    def end(self, submission_id: str, status: str, exit_code: int | None = None) -> None:
        self.jobs[submission_id] |= {"status": status, "driver_exit_code": exit_code, "end_time": 9000}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: FakeCluster

    def do_GET(self) -> None:
        self.handle_request("GET")

    def do_POST(self) -> None:
        self.handle_request("POST")

    def do_PUT(self) -> None:
        self.handle_request("PUT")

    def do_DELETE(self) -> None:
        self.handle_request("DELETE")

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self, method: str) -> None:
        cluster = self.cluster
        cluster.asked.append(f"{method} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if cluster.broken(self):
            return
        given = self.headers.get("Authorization", "")
        if cluster.token and given != f"Bearer {cluster.token}":
            self.answer(403 if given else 401, "Unauthorized: invalid token" if given else "Missing token")
            return
        if self.path.startswith("/api/packages/"):
            self.package(method, self.path.rpartition("/")[2], body)
        elif (method, self.path) == ("GET", "/api/jobs/"):
            driver = {"type": "DRIVER", "submission_id": None, "job_id": "01000000", "status": "RUNNING"}
            self.answer(200, [*cluster.jobs.values(), driver])
        elif (method, self.path) == ("POST", "/api/jobs/"):
            self.submit(json.loads(body))
        elif not self.path.startswith("/api/jobs/"):
            self.answer(404, "Not Found")
        else:
            self.job(method, *([*self.path.split("/", 4)[3:], ""])[:2])

    def package(self, method: str, name: str, body: bytes) -> None:
        if method == "PUT":
            self.cluster.packages[name] = body
        self.answer(200 if name in self.cluster.packages else 404, "")

    def submit(self, request: dict[str, Any]) -> None:
        found = request["submission_id"]
        if found in self.cluster.jobs:
            text = f"Traceback (most recent call last):\nValueError: Job with submission_id {found} already exists."
            self.answer(500, text)
            return
        self.cluster.add(found, "PENDING", **{k: request[k] for k in ("entrypoint", "metadata", "runtime_env")})
        self.cluster.run(found)
        self.answer(200, {"job_id": found, "submission_id": found})

    def job(self, method: str, found: str, what: str) -> None:
        job = self.cluster.jobs.get(found)
        if job is None:
            self.answer(404, f"Job {found} does not exist")
        elif what == "logs/tail":
            self.tail(found)
        elif what == "logs":
            self.answer(200, {"logs": self.cluster.logs.get(found, "")})
        elif what == "stop":
            running = job["status"] in ("PENDING", "RUNNING")
            if running:
                self.cluster.end(found, "STOPPED")
            self.answer(200, {"stopped": running})
        elif method == "DELETE":
            del self.cluster.jobs[found]
            self.answer(200, {"deleted": True})
        else:
            self.answer(200, job)

    def tail(self, found: str) -> None:
        """The log from its beginning, in texts, to the job's end, or cut off as ``cut_tail_after`` says."""
        key = self.headers["Sec-WebSocket-Key"].encode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + MAGIC).digest()).decode())
        self.end_headers()
        self.close_connection = True
        cut = self.cluster.cut_tail_after.pop(0) if self.cluster.cut_tail_after else None
        sent = 0
        while True:
            log = self.cluster.logs.get(found, "")
            if cut is not None and len(log) >= cut:
                self.frame(0x1, log[sent:cut].encode())
                return
            if self.cluster.ping:
                self.frame(0x9, b"still there?")
            if log[sent:]:
                half = (sent + len(log)) // 2
                self.frame(0x1, log[sent:half].encode(), last=False)
                self.frame(0x0, log[half:].encode())
                sent = len(log)
            elif self.cluster.jobs[found]["status"] not in ("PENDING", "RUNNING"):
                self.frame(0x8, struct.pack("!H", 1000))
                return
            time.sleep(0.01)

    def frame(self, kind: int, payload: bytes, *, last: bool = True) -> None:
        size = len(payload)
        head = bytes([(0x80 if last else 0) | kind])
        if size < 126:
            head += bytes([size])
        elif size < 1 << 16:
            head += bytes([126]) + struct.pack("!H", size)
        else:
            head += bytes([127]) + struct.pack("!Q", size)
        self.wfile.write(head + payload)
        self.wfile.flush()

    def answer(self, status: int, body: object) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(cluster: FakeCluster) -> Iterator[FakeCluster]:
    """The cluster at a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # whoever hangs up first is no error here
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    cluster.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
