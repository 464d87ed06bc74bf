"""The way to a cluster inside Kubernetes: its token and a port-forward, by ``kubectl`` and the user's own rights."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from steadyhelm.errors import ConfigError, UnreachableError
from steadyhelm.jobs.head import API_PORT, STATUS_PORT, TOKEN_KEY, token_secret

ASK_S = 30.0
"""How long kubectl may take to answer, and a port-forward to listen."""
AGAIN_S = 1.0
"""Seconds before a port-forward that ended is begun again."""


def kubectl(namespace: str) -> list[str]:
    """The beginning of a kubectl command; an empty namespace is the context's. Raises ConfigError without kubectl."""
    found = shutil.which("kubectl")
    if found is None:
        raise ConfigError("there is no kubectl on the PATH, and --release asks it: install it, or give --address")
    return [found, *(["--namespace", namespace] if namespace else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A RayCluster, and the Secret that has its API's token where it asks for one.

    Example: ``Named(cluster="rl", secret="team-token")``
    """

    cluster: str
    secret: str


def find(release: str, namespace: str = "") -> Named:
    """The RayCluster of that name, or of that release of the cluster chart, which may have given it another.

    Where the user may read none it is taken to have the release's name. Raises ConfigError where a release has several.
    """
    place, label = "{.metadata.name} {.spec.authOptions.secretName}", f"app.kubernetes.io/instance={release}"
    try:
        lines = [_read(namespace, place, "raycluster", release)]
        if not lines[0]:
            every = f'{{range .items[*]}}{place}{{"\\n"}}{{end}}'
            lines = _read(namespace, every, "raycluster", "--selector", label).splitlines()
    except UnreachableError:  # where it is for another reason, the next question meets that too
        lines = []
    found = [line.split() for line in lines] or [[release]]
    if len(found) > 1:
        names = ", ".join(name for name, *_ in found)
        raise ConfigError(f"the release {release!r} has more than one RayCluster: give --release one of {names}")
    name, *secret = found[0]
    return Named(cluster=name, secret=secret[0] if secret else token_secret(name))


def secret_token(secret: str, namespace: str = "") -> str:
    """The Ray API's token in that Secret; empty where there is none. Raises UnreachableError in kubectl's own words."""
    encoded = _read(namespace, f"{{.data.{TOKEN_KEY}}}", "secret", secret)
    return base64.b64decode(encoded).decode("utf-8", "replace").strip()


def _read(namespace: str, form: str, kind: str, *which: str) -> str:
    """What kubectl makes of objects by a JSONPath; empty where there is none. Raises UnreachableError."""
    command = [*kubectl(namespace), "get", kind, *which, "--output", f"jsonpath={form}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnreachableError(f"kubectl does not answer within {ASK_S:g} s: see whether the cluster is up") from error
    if done.returncode == 0:
        return done.stdout
    if "NotFound" in done.stderr:
        return ""
    raise UnreachableError(f"kubectl cannot read the {kind} {which[-1]!r}: {_last(done.stderr)}")


class PortForward:
    """Ports of a cluster's head as ports of this machine while the context lasts; begun again where it breaks.

    Args:
        cluster: name of the RayCluster.
        namespace: where; empty is the context's.
        ports: the head's ports.

    ``local`` says which port of 127.0.0.1 is which of these. Raises UnreachableError where none comes about.
    """

    def __init__(self, cluster: str, namespace: str = "", ports: Sequence[int] = (API_PORT, STATUS_PORT)) -> None:
        self.local: Mapping[int, int] = dict(zip(ports, _free_ports(len(ports)), strict=True))
        pairs = [f"{here}:{there}" for there, here in self.local.items()]
        self._command = [
            *kubectl(namespace),
            "port-forward",
            "--address",
            "127.0.0.1",
            f"svc/{cluster}-head-svc",
            *pairs,
        ]
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lines, self._words = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._keeper = threading.Thread(target=self._keep, name="port-forward", daemon=True)

    def __enter__(self) -> Self:
        self._keeper.start()
        ends = time.monotonic() + ASK_S
        while not self._listens():
            words = self._said()
            if words or time.monotonic() > ends:
                self.close()
                raise UnreachableError(f"kubectl cannot forward ports: {words or f'nothing within {ASK_S:g} s'}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the port-forward."""
        self._over.set()
        if self._process is not None:
            self._process.terminate()
        self._keeper.join(ASK_S)
        self._lines.close()
        self._words.close()

    def _keep(self) -> None:
        """Has the port-forward run until it is over."""
        while not self._over.is_set():
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._lines,
                stderr=self._words,
                start_new_session=True,  # Ctrl-C is for whoever listens here
            )
            if self._over.is_set():
                self._process.terminate()
            self._process.wait()
            self._over.wait(AGAIN_S)

    def _listens(self) -> bool:
        """Whether kubectl has said so: to connect would end it where nobody serves that port of the head yet."""
        said = os.pread(self._lines.fileno(), 1 << 16, 0).decode("utf-8", "replace")
        return all(f"127.0.0.1:{here} -> {there}" in said for there, here in self.local.items())

    def _said(self) -> str:
        """The last of kubectl's words where it has ended already."""
        if self._process is None or self._process.poll() is None:
            return ""
        return _last(os.pread(self._words.fileno(), 1 << 16, 0).decode("utf-8", "replace"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]
