"""Engine servers as processes: a stand-in in plain Python, with a child of its own, really started and killed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from steadyhelm.engines.process import EngineProcess, Launch
from steadyhelm.errors import DeadlineError, EngineLostError
from steadyhelm.store.memory import memory_folder

SERVER = """
import http.server, os, subprocess, sys, time
port, key, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
print("model is loaded", flush=True)
if how == "fails":
    sys.exit("no such device")
if how == "hangs":
    time.sleep(600)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == f"Bearer {key}"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(key.encode() if known else b"")
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def start(how: str = "serves", deadline_s: float = 30.0) -> EngineProcess:
    def plan(port: int, key: str) -> Launch:
        command = (sys.executable, "-c", SERVER, str(port), key, how)
        return Launch(command=command, environment={}, port=port, key=key, ready="/")

    return EngineProcess.start(plan, deadline_s=deadline_s, scratch_bytes=100)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(*pids: int) -> None:
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < end, "a process of the server lives on"
        time.sleep(0.02)


def child_of(server: EngineProcess) -> int:
    return int(server.tail().rpartition("child ")[2].split()[0])


def test_a_closed_server_leaves_no_process_and_no_file():
    server = start()
    child = child_of(server)
    (server.scratch / "weights").write_bytes(b"x")
    assert is_alive(server.pid)
    assert is_alive(child)
    server.close()
    wait_for_end(server.pid, child)
    assert not server.scratch.exists()
    assert server.ended.done()


def test_a_killed_server_is_noticed_and_its_child_ended():
    server = start()
    child = child_of(server)
    os.kill(server.pid, signal.SIGKILL)
    assert "ended with code -9" in server.ended.result(timeout=20)
    wait_for_end(child)
    server.close()


def test_a_server_ends_with_its_actor_however_the_actor_ends():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import threading, time, test_process\n"
        # Started by a thread that ends at once: a parent-death signal would end the server with it.
        "made = []; t = threading.Thread(target=lambda: made.append(test_process.start())); t.start(); t.join()\n"
        "time.sleep(0.3); server = made[0]; assert not server.ended.done()\n"
        "print(server.pid, test_process.child_of(server), server.scratch, flush=True); time.sleep(600)"
    )
    actor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    server, child, scratch = actor.stdout.readline().split()
    actor.kill()
    actor.wait()
    actor.stdout.close()
    wait_for_end(int(server), int(child))
    end = time.monotonic() + 10
    while Path(scratch).exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_first_errors_of_a_log_are_told_where_much_was_written_behind_them():
    server = start()
    with server._log.open("a") as log:
        log.write("(worker) RuntimeError: no such kernel\n(worker) RuntimeError: no such kernel\n")
        log.flush()
        assert server.tail().endswith("(worker) RuntimeError: no such kernel")
        log.write("a line\n" * 100)
    assert server.tail().endswith("a line\nits first errors:\nRuntimeError: no such kernel")
    server.close()


def test_a_server_that_ends_while_it_starts_is_an_error_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the log stays
    with pytest.raises(EngineLostError, match=r"(?s)model is loaded.*no such device"):
        start("fails")


def test_a_server_that_does_not_come_up_is_ended_at_the_deadline():
    with pytest.raises(DeadlineError, match=r"(?s)within 1\.5 s.*start_deadline_s.*model is loaded"):
        start("hangs", deadline_s=1.5)


def test_large_files_go_to_disk_where_memory_is_short():
    assert memory_folder(1 << 60) != Path("/dev/shm")
