"""The process between an actor and its engine server: it ends the whole server when its actor is gone.

Run as a script by path, with nothing imported but the standard library: ``guard.py LOG SCRATCH COMMAND…``. Two pipes
tie it to the actor, which holds their other ends. Standard input closes when the actor ends, however it ends; then the
server's process group is ended and ``SCRATCH`` removed. Standard output says the server's process id, then that it has
ended, and closes when all of its group has. A parent-death signal would not do: it follows the thread that started the
process and does not reach the server's own children. The guard is nobody's child, because Ray kills the children of the
actors that it ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

GRACE_S = 4.0
"""Seconds between the signal that asks the server to end and the one that ends it."""
POLL_S = 0.1
"""Seconds between two looks at a server that is ending."""


def main(log: str, scratch: str, command: list[str]) -> None:
    """Runs ``command`` with its output in ``log`` until it ends or the actor does."""
    if os.fork():
        os._exit(0)
    os.setsid()
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # its number arrives in the pipe
    signal.signal(signal.SIGTERM, lambda *_: None)
    with open(log, "ab", buffering=0) as output:  # noqa: PTH123  # nothing but what this script needs is imported
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        print(server.pid, flush=True)
        _wait(server, wake)
        code = server.poll()
        why = "its actor is gone" if code is None else f"it ended with code {code}"
        output.write(f"engine server {server.pid}: {why}\n".encode())
    with contextlib.suppress(BrokenPipeError):
        print("ended", flush=True)
    os.killpg(os.getpgrp(), signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while _others() and time.monotonic() < end:
        server.poll()
        time.sleep(POLL_S)
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _wait(server: subprocess.Popen[bytes], wake: int) -> None:
    """Returns once the server has ended or the actor's end of the pipe is closed."""
    while server.poll() is None:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 512)
        if 0 in ready and not os.read(0, 512):
            return


def _others() -> bool:
    """Whether the process group has a living member besides this process."""
    group, own = os.getpgrp(), os.getpid()
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit() or int(name) == own:
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                state, _, member_of = file.read().rpartition(b")")[2].split()[:3]
        except OSError:
            continue
        if int(member_of) == group and state not in (b"Z", b"X"):
            return True
    return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
