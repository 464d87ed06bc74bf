import json
import threading

import pytest
from steadyhelm.errors import HeldError, StoreError
from steadyhelm.store.lease import leased
from steadyhelm.store.liveness import held
from steadyhelm.testing.memory_store import MemoryStore

LEASE = "run/lease"
FOR_EVER_S = 60.0


def dead(store, **more):
    store.put(
        LEASE, json.dumps({"owner": "x", "pid": 7, "host": "gone", "since": "noon", "renewals": 3, **more}).encode()
    )


def owner(store):
    return json.loads(bytes(store.get(LEASE)))["owner"]


def hold(store, tell=lambda _: None, take_over=False, renew_s=0.01, lapse_s=FOR_EVER_S):
    return leased(store, "run", take_over=take_over, tell=tell, renew_s=renew_s, lapse_s=lapse_s)


class Watched(MemoryStore):
    """Says when an object was replaced."""

    def __init__(self):
        super().__init__()
        self.replaced = threading.Event()

    def put(self, key, data, *, if_absent=False):
        ref = super().put(key, data, if_absent=if_absent)
        if not if_absent:
            self.replaced.set()
        return ref


def test_a_lease_lasts_as_long_as_the_body_and_is_renewed_meanwhile():
    store = Watched()
    with hold(store):
        assert store.replaced.wait(30)
        assert json.loads(bytes(store.get(LEASE)))["renewals"] >= 1
    assert list(store.list("")) == []


def test_a_lease_that_moves_belongs_to_a_living_driver():
    store, told = MemoryStore(), []
    with hold(store):
        before = owner(store)
        with pytest.raises(HeldError, match=r"another driver is running run 'run' \(pid \d+ on .*--take-over"):
            hold(store, told.append).__enter__()
        assert owner(store) == before
    assert [notice.text.endswith(": waits up to 60 s to see whether it still is.") for notice in told] == [True]


def test_a_lease_that_stands_still_has_lapsed():
    store, told = MemoryStore(), []
    dead(store)
    with hold(store, told.append, lapse_s=0.1):
        assert owner(store) != "x"
    assert told[0].text.startswith("Run run was driven by pid 7 on gone, since noon")


def test_a_damaged_lease_lapses_too():
    store = MemoryStore()
    store.put(LEASE, b"{")
    with hold(store, lapse_s=0.1):
        assert owner(store)


def test_a_lease_that_is_given_up_while_somebody_waits_is_free_at_once():
    store = MemoryStore()
    dead(store)
    with hold(store, lambda _: store.delete(LEASE)):
        assert owner(store) != "x"


def test_a_take_over_waits_for_nobody_and_the_former_owner_lets_go():
    store = MemoryStore()
    with hold(store, renew_s=0.1):
        (former,) = renewing()
        with hold(store, pytest.fail, take_over=True):
            mine = owner(store)
            former.join(30)
            assert not former.is_alive()
            assert owner(store) == mine
    assert list(store.list("")) == []


def renewing():
    return [thread for thread in threading.enumerate() if thread.name == "steadyhelm-lease"]


def test_a_store_that_fails_for_a_while_does_not_end_the_lease():
    store = Watched()
    store.fail(LEASE, nth=2, error=StoreError("unreachable"))
    with hold(store):
        store.replaced.wait(30)
        assert owner(store)
    assert list(store.list("")) == []


def test_of_two_drivers_in_a_store_without_locks_one_holds_the_run():
    store = MemoryStore()
    with held(store, "run") as locked:
        assert locked
        with held(store, "other") as another:
            assert another
    assert list(store.list("")) == []
