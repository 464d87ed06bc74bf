"""A real API server with its etcd on this machine, for as long as a test takes: no nodes, no controllers."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

START_S = 90.0
OPERATOR = "system:serviceaccount:steadyhelm-system:steadyhelm-operator"
"""Whom the API server takes the operator's token for: the service account of the chart."""
MERGE = "application/merge-patch+json"


class Api:
    """Asks an API server as somebody."""

    def __init__(self, url: str, authority: Path, token: str) -> None:
        self.url, self.authority, self.token = url, authority, token
        self._pool = urllib3.PoolManager(ca_certs=str(authority), timeout=30.0, retries=False, maxsize=16)

    def call(
        self, verb: str, path: str, body: Any = None, kind: str = "application/json", **headers: str
    ) -> tuple[int, Any]:
        """HTTP status and answer."""
        sent = {"Authorization": f"Bearer {self.token}", "Content-Type": kind, **headers}
        answer = self._pool.request(
            verb, self.url + path, body=None if body is None else json.dumps(body), headers=sent
        )
        return answer.status, json.loads(answer.data) if answer.data[:1] == b"{" else answer.data.decode()

    def get(self, path: str) -> dict[str, Any] | None:
        """An object; None where there is none."""
        status, found = self.call("GET", path)
        assert status in (200, 404), found
        return found if status == 200 else None

    def must(self, verb: str, path: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
        """The answer, which has to be a good one."""
        status, answer = self.call(verb, path, body, kind)
        assert status < 300, answer
        found: dict[str, Any] = answer
        return found

    def first(self, path: str) -> list[dict[str, Any]]:
        """One object of a collection, or none where it is empty."""
        found: list[dict[str, Any]] = self.must("GET", f"{path}?limit=1")["items"]
        return found

    def watch(self, path: str) -> urllib3.BaseHTTPResponse:
        """The lines of a watch, which begins with what is there; ends with ``shutdown``, or after an hour."""
        mark = "&" if "?" in path else "?"
        return self._pool.request(
            "GET",
            f"{self.url}{path}{mark}watch=true&resourceVersion=0&timeoutSeconds=3600",
            headers={"Authorization": f"Bearer {self.token}"},
            preload_content=False,
            timeout=urllib3.Timeout(connect=30.0, read=3600.0),
        )

    def kubeconfig(self, file: Path) -> Path:
        """A file by which a program asks as the same."""
        file.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "clusters": [
                        {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.authority)}}
                    ],
                    "users": [{"name": "test", "user": {"token": self.token}}],
                }
            )
        )
        return file


@contextlib.contextmanager
def api_server(programs: Path, folder: Path) -> Iterator[tuple[Api, Api]]:
    """Starts one of the programs in a folder; yields it as asked by its administrator, and by the operator."""
    etcd, peers, port = (free_port() for _ in range(3))
    tokens = {"admin": secrets.token_hex(16), "operator": secrets.token_hex(16)}
    (folder / "tokens.csv").write_text(
        f'{tokens["admin"]},admin,1,"system:masters"\n{tokens["operator"]},{OPERATOR},2,"system:serviceaccounts"\n'
    )
    _write_keys(folder)
    commands: dict[str, list[str | Path]] = {
        "etcd": [
            programs / "etcd", f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{etcd}", f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
            f"--initial-cluster=default=http://127.0.0.1:{peers}",
        ],
        "kube-apiserver": [
            programs / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={port}",
            f"--cert-dir={folder / 'certificates'}", f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder / 'accounts.pub'}",
            f"--service-account-signing-key-file={folder / 'accounts.key'}",
        ],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            stack.enter_context(ended(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)))
        authority = folder / "certificates" / "apiserver.crt"
        ends = time.monotonic() + START_S
        while not _ready(port, authority, tokens["admin"]):
            assert time.monotonic() < ends, (folder / "kube-apiserver.log").read_text()[-3000:]
            time.sleep(0.5)
        url = f"https://127.0.0.1:{port}"
        yield Api(url, authority, tokens["admin"]), Api(url, authority, tokens["operator"])


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends a process with the block."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=15)


def _ready(port: int, authority: Path, token: str) -> bool:
    if not authority.is_file():
        return False
    try:
        return Api(f"https://127.0.0.1:{port}", authority, token).call("GET", "/readyz")[0] == 200
    except (urllib3.exceptions.HTTPError, OSError):
        return False


def free_port() -> int:
    """A port of the loopback address that nobody listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _write_keys(folder: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "accounts.key").write_bytes(private)
    (folder / "accounts.key").chmod(0o600)
    (folder / "accounts.pub").write_bytes(public)
