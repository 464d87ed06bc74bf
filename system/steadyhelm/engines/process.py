"""An engine server as a process: started, watched, ended."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from steadyhelm.engines import guard
from steadyhelm.errors import DeadlineError, EngineLostError
from steadyhelm.store.memory import memory_folder

HOST = "127.0.0.1"
OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables that lead to this process's own packages, of which the server's environment has others."""
TAIL_LINES = 40
"""Lines of the server's log that go into an error's message."""
FIRST_ERRORS = 3
"""Errors that go there too, the first ones: what ends a server is seldom among the last lines that it writes."""
ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): \S.*")
POLL_S = 0.25
"""Seconds between two looks at a server that is starting."""
TRIES = 3
"""Starts, where another process takes the port between our look at it and the server's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start an engine server.

    ``environment`` is added to this process's own. ``ready`` is the path that answers 200 once the server serves.

    Example: ``Launch(command=("python", "-m", "sglang.launch_server", "--port", "30001"), environment={}, port=30001,
    key="…", ready="/health")``
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    key: str
    ready: str


Plan = Callable[[int, str], Launch]
"""From a free port and a key that only we know (bearer token and name of the served model) to a launch."""


class EngineProcess:
    """A running engine server on this machine's loopback address, which ends with this process.

    Attributes:
        url: where it listens.
        key: its bearer token.
        pid: the server's process id, which is not its group's.
        scratch: a folder in memory, or on disk where there is no such thing, which goes away with the server.
        ended: resolves with the end of the log once the server has ended, asked to or not.
    """

    def __init__(self, launch: Launch, folder: Path, scratch_bytes: int) -> None:
        self.url = f"http://{HOST}:{launch.port}"
        self.key = launch.key
        self.scratch = Path(tempfile.mkdtemp(prefix="steadyhelm-engine-", dir=memory_folder(scratch_bytes)))
        self.ended: Future[str] = Future()
        self._gone = threading.Event()
        self._ready = launch.ready
        self._folder = folder
        self._log = folder / "server.log"
        self._guard = subprocess.Popen(
            # -P: the script's own folder would come first on the path, and has modules of ours in it.
            [sys.executable, "-P", guard.__file__, str(self._log), str(self.scratch), *launch.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name not in OURS} | dict(launch.environment),
        )
        assert self._guard.stdout is not None
        self.pid = int(self._guard.stdout.readline() or 0)
        threading.Thread(target=self._watch, name="engine server", daemon=True).start()

    @classmethod
    def start(cls, plan: Plan, *, deadline_s: float, scratch_bytes: int) -> EngineProcess:
        """The server that ``plan`` describes, once it serves.

        Args:
            plan: how it is started.
            deadline_s: longest time until it serves.
            scratch_bytes: what will lie in its scratch folder at one time.

        Raises:
            EngineLostError: it ended; the message has the end of its log.
            DeadlineError: it does not serve within ``deadline_s``, and has been ended.
        """
        end = time.monotonic() + deadline_s
        for attempt in range(1, TRIES + 1):
            folder = Path(tempfile.mkdtemp(prefix="steadyhelm-engine-"))
            server = cls(plan(_free_port(), secrets.token_hex(16)), folder, scratch_bytes)
            try:
                server._until_ready(end, deadline_s)
            except EngineLostError as error:
                server._release()
                if attempt == TRIES or "address already in use" not in str(error).lower():
                    raise
            except BaseException:
                server.close()
                raise
            else:
                return server
        raise AssertionError("the last try returns or raises")

    def end(self) -> None:
        """Begins to end the server with all its processes."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    def close(self) -> None:
        """Ends the server with all its processes and removes what it wrote."""
        self._release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _release(self) -> None:
        """Awaits the end and closes the pipes; the log stays."""
        self.end()
        self._gone.wait(guard.GRACE_S * 4)
        assert self._guard.stdout is not None
        self._guard.stdout.close()

    def tail(self) -> str:
        """The last lines of the server's log, and the first errors in it where those lines do not have them."""
        errors: dict[str, None] = {}
        last: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            with self._log.open(errors="replace") as log:
                for line in log:
                    last.append(line.rstrip("\n"))
                    if len(errors) < FIRST_ERRORS and (found := ERROR.search(line)):
                        errors[found[0]] = None
        except OSError:
            return ""
        text = "\n".join(last)
        missing = [error for error in errors if error not in text]
        return "\n".join([text, "its first errors:", *missing] if missing else [text])

    def _until_ready(self, end: float, deadline_s: float) -> None:
        while not self.ended.done():
            request = urllib.request.Request(  # noqa: S310  # our own server
                self.url + self._ready, headers={"Authorization": f"Bearer {self.key}"}
            )
            try:
                with urllib.request.urlopen(request, timeout=5.0) as answer:  # noqa: S310
                    if answer.status == 200 and self.key.encode() in answer.read():
                        return
            except (OSError, urllib.error.URLError):
                pass
            if time.monotonic() > end:
                raise DeadlineError(
                    f"The engine server at {self.url} does not serve within {deadline_s:g} s: raise "
                    f"rollout.engine.start_deadline_s, or see the end of its log:\n{self.tail()}"
                )
            time.sleep(POLL_S)
        raise EngineLostError(
            f"The engine server ended while it started; its log is {self._log}, which ends:\n{self.ended.result()}"
        )

    def _watch(self) -> None:
        assert self._guard.stdout is not None
        self._guard.stdout.readline()
        self.ended.set_result(self.tail())
        self._guard.stdout.read()
        self._guard.wait()
        self._gone.set()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
