"""Starting and ending the node."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.cluster.node import certificates, settings

HERE = Path(__file__).parent
START_S = 120.0
WAIT_S = 1800.0
"""For another node on this machine to end."""
KERNEL = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")
"""What the kubelet changes, of the whole machine."""
PACKAGES = ("containerd", "runc", "catatonit", "iptables", "conntrack", "socat", "ip", "nsenter", "setpriv")


class NoNodeError(Exception):
    """The machine cannot have a node: it says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that runs."""

    folder: Path
    programs: Path
    init: int
    """Process id of its first process, outside of its namespaces."""

    @property
    def inside(self) -> tuple[str, ...]:
        """What a command is preceded by to run in the node's network."""
        return "nsenter", "--net", f"--target={self.init}", "--"

    @property
    def kubeconfig(self) -> Path:
        """By which one signs in as administrator."""
        return self.folder / "pki" / "admin.kubeconfig"


def require(programs: Path) -> None:
    """Raises NoNodeError where the machine lacks something."""
    if os.geteuid() != 0:
        raise NoNodeError("a node of its own takes root: name a cluster in KUBECONFIG instead")
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PACKAGES if shutil.which(name, path=search) is None]
    if missing or not Path("/usr/lib/cni/bridge").exists():
        raise NoNodeError(f"a node takes {', '.join(missing) or 'the CNI plug-ins'}: Debian has them as packages")
    if not (programs / "kubelet").exists():
        raise NoNodeError(f"there is no kubelet in {programs}: .ci/kubernetes builds it")


@contextlib.contextmanager
def node(programs: Path, images: Path) -> Iterator[Node]:
    """A node that is Ready, with the images that containerd has in ``images``. Raises NoNodeError.

    One at a time on a machine: its pods' cgroups have fixed names. When the context ends, or this process does, every
    process of it is gone; its files too, unless STEADYHELM_KEEP_NODE is set.
    """
    require(programs)
    cache = images.parent
    with (cache / "node.lock").open("w") as lock:
        _take(lock)
        folder = Path(tempfile.mkdtemp(prefix="node-", dir=cache))
        kernel = {name: (Path("/proc/sys") / name).read_text() for name in KERNEL}
        try:
            settings.write(folder)
            certificates.write(folder / "pki")
            _link(images, folder / "containerd")
            with _processes(folder, programs) as started:
                yield started
        finally:
            for name, value in kernel.items():
                (Path("/proc/sys") / name).write_text(value)
            _remove_cgroups()
            if "STEADYHELM_KEEP_NODE" not in os.environ:
                shutil.rmtree(folder)


def _take(lock: IO[str]) -> None:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise NoNodeError("another node runs on this machine: wait for its end") from None
            time.sleep(1)
        else:
            return


@contextlib.contextmanager
def _processes(folder: Path, programs: Path) -> Iterator[Node]:
    init = [HERE / "init.sh", folder, programs, HERE / "dns.yaml"]
    namespaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
    # They end with this process, even when that is killed.
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "catatonit", "--", *init]
    with (folder / "init.log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        started = Node(folder=folder, programs=programs, init=_child(process))
        _until_ready(started, process)
        yield started
    finally:
        for init in _children(process):  # unshare reaps it, and ends
            os.kill(init, signal.SIGKILL)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)


def _child(process: subprocess.Popen[bytes]) -> int:
    """The first process inside."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        found = _children(process)
        if found:
            return found[0]
        time.sleep(0.02)
    raise NoNodeError(f"unshare made no namespaces, and ended with {process.poll()}")


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _until_ready(started: Node, process: subprocess.Popen[bytes]) -> None:
    ready = [*started.inside, started.programs / "kubectl", f"--kubeconfig={started.kubeconfig}"]
    ready += ["get", "node", "node0", "-o", "jsonpath={.status.conditions[?(@.type=='Ready')].status}"]
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        environment = {**os.environ, "KUBECACHEDIR": str(started.folder / "home")}
        asked = subprocess.run(ready, capture_output=True, text=True, timeout=60, env=environment)
        if asked.stdout == "True":
            return
        time.sleep(0.2)
    said = (started.folder / "init.log").read_text()
    logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted(started.folder.glob("logs/*.log")))
    raise NoNodeError(f"the node was not ready within {START_S:g} s: {said}\n{logs}")


def _link(images: Path, root: Path) -> None:
    """containerd's folder for one node: layers by hard links, as nobody writes to them, and databases as copies."""
    subprocess.run(["cp", "-al", images, root], check=True, timeout=300)
    for database in root.glob("io.containerd.*/*.db"):
        original = database.read_bytes()
        database.unlink()
        database.write_bytes(original)


def _remove_cgroups() -> None:
    """Folders of pods that are gone: nothing is in them."""
    for top in Path("/sys/fs/cgroup").glob("*/kubepods"):
        for folder in sorted((f for f in top.rglob("*") if f.is_dir()), key=lambda f: -len(f.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            top.rmdir()
