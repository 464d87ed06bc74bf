import json
import threading

from steadyhelm.store import LocalStore
from steadyhelm.store.lease import LAPSE_S
from steadyhelm.store.liveness import DriverWatch, Pulse, held
from steadyhelm.testing.memory_store import MemoryStore


def test_a_lock_says_at_once_whether_a_driver_is_there_and_who(tmp_path):
    store = LocalStore(tmp_path)
    watch = DriverWatch(store, "run")
    assert watch.look() == Pulse(alive=False)
    with held(store, "run"):
        pulse = watch.look()
        assert pulse.alive
        assert pulse.holder.startswith("pid ")
    assert watch.look() == Pulse(alive=False, holder=pulse.holder)


def test_looking_never_keeps_a_driver_from_starting(tmp_path):
    store = LocalStore(tmp_path)
    with held(store, "run"):
        pass
    stop = threading.Event()

    def look() -> None:
        watch = DriverWatch(store, "run")
        while not stop.is_set():
            watch.look()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(50):
            with held(store, "run") as locked:
                assert locked
    finally:
        stop.set()
        looking.join()


def test_a_lease_says_so_when_it_changes_or_has_stood_still_for_long():
    store, now = MemoryStore(), [0.0]
    watch = DriverWatch(store, "run", lambda: now[0])
    assert watch.look() == Pulse(alive=False)

    def renew(renewals: int) -> None:
        lease = {"owner": "x", "pid": 7, "host": "node-3", "since": "noon", "renewals": renewals}
        store.put("run/lease", json.dumps(lease).encode())

    renew(1)
    assert watch.look() == Pulse(alive=None, holder="pid 7 on node-3, since noon")
    now[0] = 5.0
    renew(2)
    assert watch.look().alive is True
    now[0] = 5.0 + LAPSE_S - 1
    assert watch.look().alive is True
    now[0] = 5.0 + LAPSE_S
    assert watch.look().alive is False
    renew(3)
    assert watch.look().alive is True
